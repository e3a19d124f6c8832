"""The run's record: what a line holds, what a resumed run cuts off, what the totals sum."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from common.group_ends import GroupFault, RefusedGroup
from common.kept_groups import TrainedSamples
from common.types import Collected, Position, Stage, UpdateResult
from learner.records.console import Console
from learner.records.group_files import read_groups
from learner.records.metrics_log import Tracker, cut_metrics, logged_until
from learner.records.prometheus import RunMetrics
from tests.helpers.run_directory import picture


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def tracker(path: Path, registry: CollectorRegistry) -> Iterator[Tracker]:
    with Console({}, "test", io.StringIO()) as console:
        tracker = Tracker(path, console, RunMetrics(registry, "test"))
        yield tracker


def run(tracker: Tracker) -> None:
    """Two iterations of stage 1, one of stage 2, an evaluation."""
    for iteration in range(2):
        with tracker.iteration("cold_start", iteration) as step:
            step.record_update(UpdateResult({"fake_score_loss": 0.5}, {}))
    with tracker.iteration("alignment", 0) as step:
        with step.timed("wait_rollouts"):
            pass
        collected = Collected(
            [], {"rollout": 1.5}, Counter({"hps:timeout": 2}), images=Counter({"host:1": 8, "host:2": 4})
        )
        collected.spreads["hps"] += [0.2, 0.4]
        metrics = {"reward/hps": 0.25, "student_gradient_norm": 1.0}
        step.record(collected, UpdateResult(metrics, {"student": 2.0}, peak_bytes=1000))
    tracker.evaluation(Position(Stage.ALIGNMENT, 1), "student", {"gold": 0.75}, 3.0)


def test_the_reason_of_dropped_groups_is_named_once(
    path: Path, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with Console({}, "test", io.StringIO()) as console:
        tracker = Tracker(path, console, RunMetrics(registry, "test"))
        for iteration in range(3):
            with tracker.iteration("alignment", iteration) as step:
                reasons = {"detector:request": "reward detector: no caption: 'a plane'"} if iteration else {}
                collected = Collected([], dropped=Counter(dict.fromkeys(reasons, 2)), reasons=reasons)
                step.record(collected, UpdateResult({}, {}))
    named = "2 groups of iteration 1 were dropped: reward detector: no caption: 'a plane'"
    text = " ".join(caplog.messages)
    assert (text.count(named), text.count("were dropped")) == (1, 1)


def test_a_term_without_a_part_in_the_gradient_is_named_once(
    path: Path, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with Console({}, "test", io.StringIO()) as console:
        tracker = Tracker(path, console, RunMetrics(registry, "test"))
        for iteration, policy in enumerate((0.02, 0.005, 0.005)):
            with tracker.iteration("alignment", iteration) as step:
                step.record_update(UpdateResult({"signal_norm/policy": policy, "signal_norm/matching": 0.995}, {}))
    told = "iteration 1: the term policy is 0.50% of the student's gradient: raise its weight, or switch it off"
    text = " ".join(caplog.messages)
    assert (text.count(told), text.count("the term")) == (1, 1)


def test_one_line_an_iteration_and_an_evaluation(tracker: Tracker, path: Path) -> None:
    run(tracker)
    written = lines(path)
    assert [(line["stage"], line["iteration"], line["kind"]) for line in written] == [
        ("cold_start", 0, "train"),
        ("cold_start", 1, "train"),
        ("alignment", 0, "train"),
        ("alignment", 1, "evaluation"),
    ]
    aligned = written[2]
    assert aligned["metrics"] == {
        "reward/hps": 0.25,
        "student_gradient_norm": 1.0,
        "dropped_groups": 2.0,
        "groups": 0.0,
    }
    assert aligned["seconds"]["worker_rollout"] == 1.5
    assert aligned["seconds"]["update_student"] == 2.0
    assert 0 <= aligned["seconds"]["wait_rollouts"] <= aligned["seconds"]["step"]
    assert written[3]["metrics"] == {"gold": 0.75}


def test_statistics_of_groups_have_a_mean_and_an_error(tracker: Tracker, path: Path) -> None:
    """The error needs two groups; a group may lack a statistic."""
    with tracker.iteration("alignment", 0) as step:
        groups = [{"grid": 1.0, "agreement": 0.5}, {"grid": 3.0}]
        step.record(Collected([], statistics=groups), UpdateResult({}, {}))
    found = lines(path)[0]["metrics"]
    assert (found["group_mean/grid"], found["group_error/grid"]) == (2.0, 1.0)
    assert found["group_mean/agreement"] == 0.5
    assert "group_error/agreement" not in found


def test_alarms_are_counted_by_detector(tracker: Tracker, registry: CollectorRegistry) -> None:
    tracker.alarm("grid")
    assert registry.get_sample_value("rtdmd_watchdog_alarms_total", {"run": "test", "detector": "grid"}) == 1


def test_a_failed_iteration_leaves_no_line(tracker: Tracker, path: Path) -> None:
    with pytest.raises(RuntimeError), tracker.iteration("alignment", 0):
        raise RuntimeError
    assert path.read_text() == ""


def test_totals_sum_the_whole_run(tracker: Tracker) -> None:
    run(tracker)
    totals = tracker.totals()
    assert totals.keys() == {"cold_start", "alignment", "evaluation"}
    assert totals["evaluation"] == 3.0


def test_prometheus_sees_the_same(tracker: Tracker, registry: CollectorRegistry) -> None:
    run(tracker)
    expected: list[tuple[str, dict[str, str], float]] = [
        ("reward", {"reward": "hps"}, 0.25),
        ("evaluation", {"policy": "student", "metric": "gold"}, 0.75),
        ("iteration", {"stage": "cold_start"}, 2),
        ("iteration", {"stage": "alignment"}, 1),
        ("gradient_norm", {"network": "student"}, 1.0),
        ("fake_score_loss", {}, 0.5),
        ("part_seconds_total", {"part": "update_student"}, 2.0),
        ("part_seconds_total", {"part": "evaluation"}, 3.0),
        ("updates_total", {"network": "student"}, 1),
        ("reward_spread", {"reward": "hps"}, 0.3),
        ("peak_memory_bytes", {"process": "learner"}, 1000),
    ]
    for name, labels, value in expected:
        assert registry.get_sample_value(f"rtdmd_{name}", {"run": "test", **labels}) == pytest.approx(value), name
    # `Rollouts` counts groups and the workers' seconds when each group finishes.
    assert registry.get_sample_value("rtdmd_groups_total", {"run": "test", "outcome": "dropped"}) == 0
    assert registry.get_sample_value("rtdmd_worker_seconds_total", {"run": "test", "part": "rollout"}) is None


def test_refused_groups_are_named_and_idle_models_shown(path: Path, registry: CollectorRegistry) -> None:
    shown, refused = io.StringIO(), [RefusedGroup("host:1", GroupFault.DAMAGED)] * 2
    with Console({}, "test", shown) as console:
        tracker = Tracker(path, console, RunMetrics(registry, "test"))
        for idle in ({"host:1": 1.0, "host:2": 0.0}, {"host:2": 3.0}):
            with tracker.iteration("alignment", 4) as step:
                step.record(
                    Collected([], refused=refused, model_s=dict.fromkeys(idle, 1.0), idle_s=idle), UpdateResult({}, {})
                )
            refused = []
    text = " ".join(shown.getvalue().split())
    assert text.count("iteration 4: 2 groups of worker host:1 arrived damaged at the learner") == 1
    assert registry.get_sample_value("rtdmd_worker_idle_ratio", {"run": "test"}) == 0.75, "the first worker is gone"
    assert "refused" not in json.dumps([line["metrics"] for line in lines(path)])


def test_what_was_trained_without_a_reward_is_counted(
    tracker: Tracker, path: Path, registry: CollectorRegistry
) -> None:
    for iteration in range(2):
        with tracker.iteration("alignment", iteration) as step:
            collected = Collected([], renormalised=Counter({"hps:timeout": 3}))
            step.record(collected, UpdateResult({"left_out_gradients/hps:nan": 16.0}, {}))
    assert lines(path)[1]["metrics"] == {
        "left_out_gradients/hps:nan": 16.0,
        "dropped_groups": 0.0,
        "groups": 0.0,
        "renormalised_groups/hps:timeout": 3.0,
    }
    labels = {"run": "test", "reward": "hps", "cause": "nan"}
    assert registry.get_sample_value("rtdmd_left_out_gradients_total", labels) == 32


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def line(stage: str, iteration: int, kind: str = "train") -> str:
    return json.dumps({"stage": stage, "iteration": iteration, "kind": kind, "metrics": {}, "seconds": {}})


WHOLE = [
    *(line("cold_start", iteration) for iteration in range(3)),
    line("alignment", 0),
    line("alignment", 1),
    line("alignment", 2, "evaluation"),
    line("alignment", 2),
    line("alignment", 3),
    line("alignment", 4, "evaluation"),
]


@pytest.mark.parametrize(
    ("position", "kept"),
    [
        (Position(Stage.COLD_START, 0), 0),
        (Position(Stage.COLD_START, 2), 2),
        (Position(Stage.COLD_START, 3), 3),
        (Position(Stage.ALIGNMENT, 1), 4),
        (Position(Stage.ALIGNMENT, 2), 6),  # with the evaluation made after two iterations
        (Position(Stage.ALIGNMENT, 3), 7),
        (Position(Stage.ALIGNMENT, 4), 9),
    ],
)
def test_lines_past_the_checkpoint_are_cut(path: Path, position: Position, kept: int) -> None:
    path.write_text("\n".join(WHOLE) + "\n")
    cut_metrics(path, position)
    assert path.read_text().splitlines() == WHOLE[:kept]
    assert [child.name for child in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_cut(path: Path) -> None:
    path.write_text("\n".join(WHOLE) + '\n{"stage": "alig')
    cut_metrics(path, Position(Stage.ALIGNMENT, 9))
    assert path.read_text() == "\n".join(WHOLE) + "\n"


@pytest.mark.parametrize("damaged", [b"\xe9", b"null", b"{}", b'{"stage": "x", "iteration": 0, "kind": "train"}'])
def test_a_damaged_line_is_cut(path: Path, damaged: bytes) -> None:
    path.write_bytes(damaged + b"\n" + "\n".join(WHOLE).encode() + b"\n")
    assert logged_until(path) == Position(Stage.ALIGNMENT, 4)
    cut_metrics(path, Position(Stage.ALIGNMENT, 9))
    assert path.read_text().splitlines() == WHOLE


def test_a_run_without_metrics_has_nothing_to_cut(path: Path) -> None:
    cut_metrics(path, Position(Stage.ALIGNMENT, 9))
    assert not path.exists()


def test_groups_are_kept_beside_the_metrics(tracker: Tracker, path: Path) -> None:
    trained = TrainedSamples((1.0, 0.5, 0.0), np.float32([[1, -1, 0, 0]]), np.ones((1, 4), bool), (0,), False)
    with tracker.iteration("alignment", 3) as step:
        step.record(Collected([], pictures={0: picture("a prompt", 0)}), UpdateResult({}, {}, trained))
    assert [group.prompt for group in read_groups(path.parent, "alignment-000003").groups] == ["a prompt"]
    assert lines(path)[0]["time"] == pytest.approx(time.time(), abs=600)


def test_a_run_goes_on_if_groups_cannot_be_kept(tracker: Tracker, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path.parent / "samples").write_text("in the way", encoding="utf-8")
    trained = TrainedSamples((1.0, 0.0), np.zeros((1, 4), np.float32), np.ones((1, 4), bool), (), True)
    for iteration in range(2):
        with tracker.iteration("alignment", iteration) as step:
            step.record(Collected([], pictures={0: picture("a prompt", 0)}), UpdateResult({}, {}, trained))
    assert len(lines(path)) == 2
    assert " ".join(caplog.messages).count("groups are not kept for the live page") == 1
