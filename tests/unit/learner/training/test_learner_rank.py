"""A rank of the learner: each trainer gets the settings of its own stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config.run import Config
from common.rewards.access import RewardAccess
from learner.training.learner_rank import LearnerRank
from tests.helpers.tiny_training import PROMPTS
from tests.helpers.trained_run import tiny_config


def rank_of(config: Config) -> LearnerRank:
    threads = torch.get_num_threads()
    access = RewardAccess((), {}, config.reward_client, token=None, redis=None, cached_scores=1)
    try:
        return LearnerRank(config, PROMPTS, access, "cpu", None)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.0), (0.0, 0.25)])
def test_each_stage_has_its_own_consistency_weight(tiny_pipeline: Path, first: float, second: float) -> None:
    values = tiny_config(tiny_pipeline, Path("unused")).model_dump(mode="json")
    values["cold_start"]["consistency_weight"], values["alignment"]["consistency_weight"] = first, second
    rank = rank_of(Config.model_validate(values))
    assert rank._cold_start._matching.consistency_weight == first
    assert rank._alignment._matching.consistency_weight == second
