"""Checks before a run that the run file alone cannot decide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.config.rewards import RewardConfig
from common.errors import ConfigError
from common.types import Prompt, PromptSets
from learner.preflight.checks import check_enough_prompts, check_reward_devices, warn_of_repeated_prompts
from learner.preflight.command_line import parse


def prompt_sets(evaluation: int) -> PromptSets:
    train = [Prompt(place, f"prompt {place}") for place in range(100)]
    return PromptSets(train, train, train[:evaluation])


def test_the_final_table_needs_a_prompt() -> None:
    config = parse(["--evaluation.final_from", "32"], {}).config
    check_enough_prompts(config, prompt_sets(33))
    with pytest.raises(ConfigError, match=r"evaluation\.final_from = 32, but .*evaluation\.txt has only 32 prompts"):
        check_enough_prompts(config, prompt_sets(32))


def test_final_prompts_that_are_trained_on_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["--evaluation.final_from", "32", "--evaluation.final_prompts", "10"], {}).config
    prompts = prompt_sets(100)
    own = [Prompt(place, f"another {place}") for place in range(100)]
    warn_of_repeated_prompts(config, replace(prompts, evaluation=[*own[:35], *prompts.evaluation[:4], *own[50:]]))
    expected = "warning: 4 of the 10 prompts of the final table (zoo/prompts/evaluation.txt) are training prompts too"
    assert capsys.readouterr().err.startswith(expected)
    warn_of_repeated_prompts(config, replace(prompts, evaluation=own))
    assert capsys.readouterr().err == ""


def test_a_reward_on_a_gpu_that_is_not_there_is_refused_with_the_devices_that_are() -> None:
    pytest.importorskip("torch")
    config = parse([], {}).config
    one, two = RewardConfig(name="one", scorer="ocr"), RewardConfig(name="two", scorer="hps", device="cuda:97")
    check_reward_devices(config.model_copy(update={"rewards": (one,)}))
    with pytest.raises(ConfigError, match=r"rewards\.two\.device = cuda:97: usable on this machine: cpu"):
        check_reward_devices(config.model_copy(update={"rewards": (one, two)}))
