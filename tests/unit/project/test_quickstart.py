"""docs/quickstart.md: its reward scores, and its run file is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.config.run import Config
from reward_servers.scorers.base import Scorer

PAGE = (Path(__file__).resolve().parents[3] / "docs/quickstart.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


def test_the_reward_is_a_scorer_that_measures_what_it_says() -> None:
    names: dict[str, Any] = {}
    exec(compile(block("python"), "my_reward.py", "exec", dont_inherit=True), names)
    scorer: Scorer = names["Warmth"].load(None, "cpu")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 0] = images[1, ..., 2] = 51
    assert scorer.score(images, ["a", "b"], [{}, {}]) == pytest.approx([0.2, -0.2])
    assert scorer.score(images, ["a", "b"], [{}, {}]).dtype == np.float32


def test_the_run_file_is_valid() -> None:
    config = Config.model_validate(yaml.safe_load(block("yaml")))
    assert [reward.name for reward in config.rewards if reward.trained] == ["warmth", "hps"]
    assert [reward.name for reward in config.rewards if reward.evaluation_only] == ["clipscore"]
    assert config.alignment.group_size == 16
