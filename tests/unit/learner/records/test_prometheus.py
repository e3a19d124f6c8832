"""The driver's metrics: what each event changes, and that many workers do not make many series."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from common.config.run import Config
from common.errors import AttestationError, LearnerError
from common.metrics.driver import DRIVER_METRICS
from common.types import PolicyVersion, ProcessPlace, RewardHealth, RolloutOutcome, ScoringFailure
from learner.records.prometheus import RunMetrics
from tests.helpers.hand_clock import HandClock

MOST_SERIES = 2000
TIMEOUT = ScoringFailure("hps", "timeout", "no answer within 1 s")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def metrics(clock: HandClock) -> RunMetrics:
    return RunMetrics(CollectorRegistry(), "test", clock)


def value(metrics: RunMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"rtdmd_{name}", {"run": "test", **labels})


def series(metrics: RunMetrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect())


def place(number: int) -> ProcessPlace:
    return ProcessPlace("node", "host", number)


def outcome(version: int = 0, failure: ScoringFailure | None = None, *left_out: ScoringFailure) -> RolloutOutcome:
    seconds = {"weights": 0.25, "rollout": 2.0}
    return RolloutOutcome(
        "host:1", PolicyVersion(version, "x"), seconds, failure, left_out, reward_seconds={"hps": 0.5}
    )


def test_a_registry_has_the_metrics_of_the_catalogue_and_no_others(metrics: RunMetrics) -> None:
    found = {family.name for family in metrics.registry.collect()}
    assert found == {spec.name.removesuffix("_total") for spec in DRIVER_METRICS}


def test_counters_are_zero_before_anything_fails(metrics: RunMetrics) -> None:
    assert value(metrics, "worker_restarts_total") == 0
    assert value(metrics, "failures_total", error="AttestationError") == 0
    assert value(metrics, "groups_total", outcome="dropped") == 0


def test_a_group_is_counted_when_it_finishes(metrics: RunMetrics, clock: HandClock) -> None:
    clock.now = 7.0
    metrics.group_finished(outcome(2), 8, 3, retried=False)
    metrics.group_finished(outcome(2, None, TIMEOUT), 8, 3, retried=False)
    metrics.group_finished(outcome(2, TIMEOUT), 8, 3, retried=True)
    metrics.group_finished(outcome(2, TIMEOUT), 8, 3, retried=False)
    for name in ("scored", "renormalised", "retried", "dropped"):
        assert value(metrics, "groups_total", outcome=name) == 1, name
    assert value(metrics, "images_total") == 16
    assert value(metrics, "staleness_iterations") == 1
    assert value(metrics, "policy_version") == 2
    assert value(metrics, "apply_seconds") == 0.25
    assert value(metrics, "worker_seconds_total", part="rollout") == 8
    assert value(metrics, "reward_seconds_count", reward="hps") == 4
    assert value(metrics, "dropped_groups_total", reward="hps", cause="timeout") == 1
    assert value(metrics, "renormalised_groups_total", reward="hps", cause="timeout") == 1
    assert value(metrics, "progress_timestamp_seconds") == 7


def test_workers_report_their_rewards_until_they_rest(metrics: RunMetrics) -> None:
    down = {"hps": RewardHealth({"closed": 0, "open": 2, "half_open": 0}, 1)}
    metrics.worker_reported(place(1), down, 100)
    metrics.worker_reported(place(2), {"hps": RewardHealth({"closed": 2, "open": 0, "half_open": 0}, 0)}, 300)
    metrics.worker_reported(place(1), down, 200)
    assert value(metrics, "reward_connections", reward="hps", state="open") == 2
    assert value(metrics, "reward_connections", reward="hps", state="closed") == 2
    assert value(metrics, "reward_held_workers", reward="hps") == 1
    assert value(metrics, "peak_memory_bytes", process="workers") == 300
    metrics.worker_rests(place(1))
    metrics.worker_rests(place(1))
    assert value(metrics, "reward_connections", reward="hps", state="open") == 0
    assert value(metrics, "reward_connections", reward="hps", state="closed") == 2
    assert value(metrics, "reward_held_workers", reward="hps") == 0


def test_states_that_no_worker_is_in_are_zero(metrics: RunMetrics) -> None:
    metrics.workers({"ready": 3, "missing": 1})
    metrics.workers({"ready": 4})
    assert value(metrics, "workers", state="ready") == 4
    assert value(metrics, "workers", state="missing") == 0
    assert value(metrics, "workers", state="unhealthy") == 0


def test_the_error_that_ends_a_run_is_counted_by_its_class(metrics: RunMetrics) -> None:
    for error in (AttestationError("x"), LearnerError("y"), OSError("z")):
        metrics.failed(error)
    for name in ("AttestationError", "LearnerError", "other"):
        assert value(metrics, "failures_total", error=name) == 1, name


def test_a_checkpoint_has_a_time_and_a_size(metrics: RunMetrics, clock: HandClock, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "about.json").write_bytes(b"x" * 10)
    clock.now = 50.0
    metrics.checkpoint_written(tmp_path)
    assert value(metrics, "checkpoint_bytes") == 110
    assert value(metrics, "checkpoint_timestamp_seconds") == 50


def test_the_run_file_and_the_machine_are_shown(metrics: RunMetrics, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    sections = {
        "run": {"name": "test"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "workers": {"min": 2, "max": 8, "num_gpus": 0.5},
        "rewards": [
            {"name": "hps", "url": "http://x", "weight": 0.5, "differentiable": True},
            {"name": "gold", "scorer": "a:B", "weight": 0, "evaluation_only": True},
        ],
    }
    metrics.configured(Config.model_validate(sections), tmp_path / "not" / "there")
    assert value(metrics, "workers_wanted") == 2
    assert value(metrics, "gpus", process="workers") == 4
    assert value(metrics, "reward_weight", reward="hps") == 0.5
    assert value(metrics, "reward_weight", reward="gold") == 0
    assert value(metrics, "reward_server_restarts_total", reward="gold") == 0
    assert value(metrics, "reward_server_restarts_total", reward="hps") is None
    free, whole = value(metrics, "disk_free_bytes"), value(metrics, "disk_bytes")
    assert free is not None
    assert whole is not None
    assert 0 < free < whole


def test_a_large_run_has_few_series(metrics: RunMetrics) -> None:
    """256 workers that are all replaced twice, eight rewards, every cause of a failure, both stages."""
    rewards = [f"reward_{number}" for number in range(8)]
    healthy = {name: RewardHealth({"closed": 4, "open": 0, "half_open": 0}, 0) for name in rewards}
    causes = [ScoringFailure(name, cause, "") for name in rewards for cause in ("timeout", "refused", "nan", "scorer")]
    for number in range(3 * 256):
        metrics.worker_reported(place(number), healthy, number)
        seconds = dict.fromkeys(("weights", "rollout", "decode", "score", "held"), 1.0)
        spent = dict.fromkeys(rewards, 0.5)
        failure = causes[number % len(causes)] if number % 2 else None
        group = RolloutOutcome(str(place(number)), PolicyVersion(0, "x"), seconds, failure, tuple(causes), spent)
        metrics.group_finished(group, 8, 0, retried=False)
        metrics.worker_rests(place(number))
    metrics.workers({"ready": 256})
    parts = [f"{kind}_{part}" for kind in ("update", "wait") for part in range(10)]
    for stage in ("cold_start", "alignment"):
        numbers = {f"{kind}/{name}": 0.5 for kind in ("reward", "zero_spread") for name in rewards}
        numbers |= {f"left_out_gradients/{one.reward}:{one.cause}": 1.0 for one in causes}
        metrics.iteration_finished(stage, 1, numbers, {"step": 1.0, **dict.fromkeys(parts, 1.0)})
    for policy in ("teacher_28", "teacher_4", "cold_start", "student", "rtdmd"):
        metrics.evaluated(policy, dict.fromkeys([*rewards, "diversity"], 0.5), 1.0)
    assert series(metrics) <= MOST_SERIES / 2
