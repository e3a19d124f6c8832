"""The learner's process: each trainer gets the settings and the prompts of its own stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config.run import Config
from common.rewards.access import RewardAccess
from common.types import Prompt
from learner.compose import _load_prompts
from learner.training.actor import Learner
from tests.helpers.tiny_training import PROMPTS
from tests.helpers.trained_run import tiny_config


def learner_of(config: Config) -> Learner:
    threads = torch.get_num_threads()
    access = RewardAccess((), {}, config.reward_client, token=None, redis=None, cached_scores=1)
    try:
        return Learner(config, PROMPTS, access, "cpu", None)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.0), (0.0, 0.25)])
def test_each_stage_has_its_own_consistency_weight(tiny_pipeline: Path, first: float, second: float) -> None:
    values = tiny_config(tiny_pipeline, Path("unused")).model_dump(mode="json")
    values["cold_start"]["consistency_weight"], values["alignment"]["consistency_weight"] = first, second
    learner = learner_of(Config.model_validate(values))
    assert learner._cold_start._matching.consistency_weight == first
    assert learner._alignment._matching.consistency_weight == second


def test_each_stage_has_its_own_prompts(tmp_path: Path) -> None:
    values = tiny_config(tmp_path, tmp_path).model_dump(mode="json")
    for name in ("train", "cold_start", "evaluation"):
        (tmp_path / f"{name}.txt").write_text(f"{name} prompt\n")
        values["prompts"][name] = str(tmp_path / f"{name}.txt")
    prompts = _load_prompts(Config.model_validate(values))
    assert prompts.cold_start == [Prompt(0, "cold_start prompt")]
    assert prompts.alignment == [Prompt(0, "train prompt")]
    assert prompts.evaluation == [Prompt(0, "evaluation prompt")]


def test_without_a_file_of_its_own_the_cold_start_has_the_training_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dot\n")
    prompts = _load_prompts(tiny_config(tmp_path, tmp_path / "prompts.txt"))
    assert prompts.cold_start == prompts.alignment == [Prompt(0, "a dot")]
