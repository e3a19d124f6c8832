"""Evaluations in which some prompts lack a reward."""

from __future__ import annotations

import numpy as np

from learner.driver.evaluation import mean_rewards


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_mean_is_over_every_image() -> None:
    assert mean_rewards([{"hps": scores(0, 1)}, {"hps": scores(1, 1)}]) == {"hps": 0.75}


def test_a_prompt_without_a_reward_counts_as_missing_not_as_zero() -> None:
    rewards = [{"pick": scores(1, 1)}, {"hps": scores(0.5, 0.5), "pick": scores(0, 0)}]
    assert mean_rewards(rewards) == {"pick": 0.5, "hps": 0.5, "unscored": 1.0}
