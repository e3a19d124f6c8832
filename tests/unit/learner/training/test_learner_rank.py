"""A rank of the learner: settings of its trainers, and its end after a failure."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from common.config.run import Config
from common.errors import AttestationError, TrainingError
from common.progress import Progress
from common.rewards.access import RewardAccess
from common.types import Stage
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


def small(pipeline: Path) -> Config:
    """A configuration whose batches are of four prompts."""
    values = tiny_config(pipeline, Path("unused")).model_dump(mode="json")
    values["cold_start"]["batch_size"] = 4
    return Config.model_validate(values)


@pytest.fixture
def held_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference is the value itself."""
    monkeypatch.setattr(ray, "get", lambda reference: reference)


@pytest.mark.usefixtures("held_references", "one_thread")
def test_a_rank_continues_from_a_snapshot_of_another_to_the_bit(tiny_pipeline: Path) -> None:
    config = small(tiny_pipeline)
    first, second = rank_of(config), rank_of(config)
    first.cold_start(0)
    second.load_snapshot([first.snapshot({})])
    assert first.cold_start(1).values() == second.cold_start(1).values()
    assert second.state_fingerprint() == first.state_fingerprint()
    first.begin_alignment()
    taken = first.snapshot({3: "policy"})
    assert (taken.stage, taken.policies) == (Stage.ALIGNMENT, {3: "policy"})
    third = rank_of(config)
    third.load_snapshot([taken])
    assert third.state_fingerprint() == first.state_fingerprint() != second.state_fingerprint()


@pytest.mark.usefixtures("held_references")
def test_a_damaged_snapshot_is_refused(tiny_pipeline: Path) -> None:
    config = tiny_config(tiny_pipeline, Path("unused"))
    taken = rank_of(config).snapshot({})
    name = next(iter(taken.state))
    damaged = replace(taken, state={**taken.state, name: taken.state[name] + 1})
    with pytest.raises(AttestationError, match="a snapshot of cold_start was damaged"):
        rank_of(config).load_snapshot([damaged])


@pytest.mark.usefixtures("one_thread")
def test_a_rank_reports_the_parts_of_an_update(tiny_pipeline: Path) -> None:
    rank = rank_of(small(tiny_pipeline))
    begun: list[str] = []
    trainer = rank._cold_start
    trainer._begin_step = lambda step: begun.extend([step, *(at.name for at in rank.heartbeat().at_work)])
    rank.cold_start(9)
    assert begun == ["fake_score", "cold_start", "student", "cold_start"]
    assert rank.heartbeat().at_work == ()


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
    rank._ranks, rank._cold_start, rank._progress = ranks, FailingTrainer(), Progress("node")
    rank._limits_s, rank._pass_limit_s = {}, 60.0
    with pytest.raises(TrainingError, match="no gradient in iteration 3"):
        rank.cold_start(3)
    assert timers == ([(EXIT_DELAY_S, os._exit, [1])] if ends else [])
