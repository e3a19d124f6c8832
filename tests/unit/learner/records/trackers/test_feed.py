"""A tracker gets every line of a run once, whatever was in the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.config.trackers import TrackerKind
from common.errors import ConfigError
from learner.records.trackers.feed import Feed
from learner.records.trackers.protocol import TrackedRun
from tests.helpers.tracked_run import KeepingTracker, add_lines, metrics_line, tracked_config, write_tracked_run

Feeds = Callable[[], Feed]
WHOLE = [
    (1, "loss/fake_score_loss"),
    (2, "loss/fake_score_loss"),
    (3, "reward/hps"),
    (3, "evaluation/gold"),
    (3, "samples: alignment-000001.png"),
    (4, "reward/hps"),
    (4, "policies"),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_tracked_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def opened() -> list[TrackedRun]:
    return []


@pytest.fixture
def tracker(opened: list[TrackedRun], monkeypatch: pytest.MonkeyPatch) -> KeepingTracker:
    tracker = KeepingTracker()

    def open_(_: TrackerKind, run: TrackedRun) -> KeepingTracker:
        opened.append(run)
        return tracker

    monkeypatch.setattr("learner.records.trackers.feed.open_tracker", open_)
    return tracker


@pytest.fixture
def feeds(run_dir: Path) -> Iterator[Feeds]:
    with ExitStack() as stack:

        def feed() -> Feed:
            made = Feed(run_dir, tracked_config(), TrackerKind.WANDB)
            stack.callback(made.close)
            return made

        yield feed


def test_the_whole_run_is_sent(run_dir: Path, tracker: KeepingTracker, feeds: Feeds) -> None:
    assert feeds().send() == 5
    assert tracker.got == WHOLE
    assert tracker.values[3, "evaluation/gold"] == 0.75
    assert tracker.values[4, "seconds/step"] == 1.5
    assert tracker.rows == [
        ["policy", "gold", "diversity"],
        ["teacher_28", 0.75, 0.5],
        ["rtdmd", 0.875, None],
    ]
    assert tracker.options["cold_start.iterations"] == "2"
    assert tracker.options["rewards.a.differentiable"] == "true"


def test_only_what_is_new_is_sent(
    run_dir: Path, tracker: KeepingTracker, opened: list[TrackedRun], feeds: Feeds
) -> None:
    """By the same feed, and by one of a later process, which continues the same run."""
    first = feeds()
    first.send()
    add_lines(run_dir, metrics_line("alignment", 2, **{"reward/hps": 0.75}))
    assert first.send() == 1
    assert first.send() == 0
    first.close()
    add_lines(run_dir, metrics_line("alignment", 3, **{"reward/hps": 0.75}))
    assert feeds().send() == 1
    assert tracker.got == [*WHOLE, (5, "reward/hps"), (6, "reward/hps")]
    assert [run.id for run in opened] == [opened[0].id] * 2


def test_a_line_that_is_being_written_is_sent_when_it_is_complete(
    run_dir: Path, tracker: KeepingTracker, feeds: Feeds
) -> None:
    line = metrics_line("alignment", 2, **{"reward/hps": 0.75})
    one = feeds()
    add_lines(run_dir, line[:20])
    assert one.send() == 5
    add_lines(run_dir, line[20:])
    assert one.send() == 1


@pytest.mark.parametrize("line", ["null", "{}", "\xe9", '{"kind": "alarm"}', metrics_line("x", 1).strip()])
def test_a_damaged_or_foreign_line_is_left_out(line: str, run_dir: Path, tracker: KeepingTracker, feeds: Feeds) -> None:
    add_lines(run_dir, line + "\n", metrics_line("alignment", 2, **{"reward/hps": 0.75}))
    assert feeds().send() == 6


def test_after_a_failure_nothing_is_missing(run_dir: Path, tracker: KeepingTracker, feeds: Feeds) -> None:
    one = feeds()
    one.send()
    add_lines(run_dir, *(metrics_line("alignment", iteration, gold=1.0) for iteration in (2, 3)))
    tracker.broken = ConnectionError("unreachable")
    with pytest.raises(ConnectionError):
        one.send()
    assert tracker.closed == 1
    tracker.broken = None
    assert one.send() == 2
    assert tracker.got[len(WHOLE) :] == [(5, "loss/gold"), (6, "loss/gold")]


def test_iterations_that_a_resumed_run_repeats_are_not_sent_again(
    run_dir: Path, tracker: KeepingTracker, feeds: Feeds
) -> None:
    first = feeds()
    first.send()
    first.close()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:3]))
    resumed = feeds()
    add_lines(run_dir, *lines[3:])
    assert resumed.send() == 0


def test_a_new_summary_is_sent(run_dir: Path, tracker: KeepingTracker, feeds: Feeds) -> None:
    one = feeds()
    one.send()
    (run_dir / "summary.json").write_text(json.dumps({"policies": {"rtdmd": {"gold": 0.5}}}))
    one.send()
    assert tracker.rows == [["policy", "gold"], ["rtdmd", 0.5]]


def test_a_damaged_progress_sends_everything_as_a_new_run(
    run_dir: Path, tracker: KeepingTracker, opened: list[TrackedRun], feeds: Feeds
) -> None:
    first = feeds()
    first.send()
    first.close()
    (run_dir / "logs" / "tracker_wandb.json").write_text('{"id": ')
    assert feeds().send() == 5
    assert opened[0].id != opened[1].id


def test_one_process_sends_at_a_time(run_dir: Path, tracker: KeepingTracker, feeds: Feeds) -> None:
    first, second = feeds(), feeds()
    first.send()
    with pytest.raises(ConfigError, match="another process sends this run to wandb"):
        second.send()
    first.close()
    assert second.send() == 0
    second.close()


def test_a_run_that_has_written_nothing_yet(run_dir: Path, tracker: KeepingTracker, feeds: Feeds) -> None:
    for name in ("metrics.jsonl", "summary.json"):
        (run_dir / name).unlink()
    assert feeds().send() == 0
    assert tracker.got == []
