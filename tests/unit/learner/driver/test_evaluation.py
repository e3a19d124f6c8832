"""Evaluations in which some prompts lack a reward."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from common.types import EvaluatedPrompt, Prompt
from learner.driver.evaluation import Evaluation, mean_rewards, save_grid


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_mean_is_over_every_image() -> None:
    assert mean_rewards([{"hps": scores(0, 1)}, {"hps": scores(1, 1)}]) == {"hps": 0.75}


def test_a_prompt_without_a_reward_counts_as_missing_not_as_zero() -> None:
    rewards = [{"pick": scores(1, 1)}, {"hps": scores(0.5, 0.5), "pick": scores(0, 0)}]
    assert mean_rewards(rewards) == {"pick": 0.5, "hps": 0.5, "unscored": 1.0}


def test_a_grid_has_its_prompts_and_scores_beside_it(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    prompts = [EvaluatedPrompt(Prompt(i, f"prompt {i}"), images + i, {"hps": scores(0.5, i)}, 0.1) for i in range(3)]
    save_grid(Evaluation({}, prompts), tmp_path / "alignment-000010.png", 2)
    with Image.open(tmp_path / "alignment-000010.png") as grid:
        assert grid.size == (2 * 4, 2 * 3)
    assert json.loads((tmp_path / "alignment-000010.json").read_text()) == {
        "columns": 2,
        "height": 3,
        "width": 4,
        "prompts": [
            {"prompt": "prompt 0", "scores": {"hps": [0.5, 0.0]}},
            {"prompt": "prompt 1", "scores": {"hps": [0.5, 1.0]}},
        ],
    }
