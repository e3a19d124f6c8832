"""A rank of the learner: settings of its trainers, and its end after a failure."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.config.run import Config
from common.errors import TrainingError
from common.rewards.access import RewardAccess
from learner.training import thread_probe
from learner.training.learner_rank import EXIT_DELAY_S, LearnerRank
from learner.training.ranks import ALONE, Ranks
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


def test_timing_threads_leaves_no_trace(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of(tiny_config(tiny_pipeline, Path("unused")))
    monkeypatch.setattr(thread_probe, "BUDGET_S", 0.0)
    before, drawn = rank.state_fingerprint(), torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        seconds = rank.time_threads()
        rank.use_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert list(seconds) == [thread_probe.usable_cpus()]
    assert all(taken > 0 for taken in seconds.values())
    assert rank.state_fingerprint() == before
    assert torch.equal(torch.get_rng_state(), drawn)
    networks = rank._networks
    assert all(weight.grad is None for weight in networks.backbone.adapters.parameters("cold_start").values())


class FailingTrainer:
    def update(self, iteration: int) -> None:
        raise TrainingError(f"no gradient in iteration {iteration}")


@pytest.mark.parametrize(
    ("ranks", "ends"),
    [(Ranks(1, 2, sharded=True), True), (Ranks(0, 2, sharded=True), False), (Ranks(1, 2), False), (ALONE, False)],
)
def test_a_failed_rank_ends_its_process_if_others_wait_for_its_weights(
    ranks: Ranks, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[tuple[float, Callable[..., object], list[int]]] = []

    class Timer:
        def __init__(self, seconds: float, function: Callable[..., object], arguments: list[int]) -> None:
            self._timer = (seconds, function, arguments)

        def start(self) -> None:
            timers.append(self._timer)

    monkeypatch.setattr(threading, "Timer", Timer)
    rank = LearnerRank.__new__(LearnerRank)
    rank._ranks, rank._cold_start = ranks, FailingTrainer()
    with pytest.raises(TrainingError, match="no gradient in iteration 3"):
        rank.cold_start(3)
    assert timers == ([(EXIT_DELAY_S, os._exit, [1])] if ends else [])
