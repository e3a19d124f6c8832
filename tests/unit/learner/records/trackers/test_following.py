"""Trackers never stop a run, and get what they missed."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest

from common.config.trackers import TrackerKind
from learner.records.trackers import following
from learner.records.trackers.feed import Feed
from learner.records.trackers.following import followed
from tests.helpers.tracked_run import KeepingTracker, add_lines, metrics_line, tracked_config, write_tracked_run
from tests.helpers.waiting import wait_until

FAST = {"poll_s": 0.01, "retry_s": 0.01}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_tracked_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> KeepingTracker:
    tracker = KeepingTracker()
    monkeypatch.setattr("learner.records.trackers.feed.open_tracker", lambda *_: tracker)
    return tracker


def feed(run_dir: Path) -> Feed:
    return Feed(run_dir, tracked_config(), TrackerKind.WANDB)


def test_lines_are_sent_while_the_run_goes_on(run_dir: Path, tracker: KeepingTracker) -> None:
    said: list[str] = []
    with followed([feed(run_dir)], said.append, **FAST):
        wait_until(lambda: (4, "reward/hps") in tracker.got, "the first lines to be sent")
        add_lines(run_dir, metrics_line("alignment", 2, **{"reward/hps": 0.75}))
        wait_until(lambda: (5, "reward/hps") in tracker.got, "the next line to be sent")
        add_lines(run_dir, metrics_line("alignment", 3, **{"reward/hps": 0.75}))
    assert tracker.got[-1] == (6, "reward/hps")
    assert (tracker.closed, said) == (1, [])


def test_a_tracker_that_cannot_be_reached_is_named_once_and_gets_everything_later(
    run_dir: Path, tracker: KeepingTracker
) -> None:
    said: list[str] = []
    tracker.broken = ConnectionError("no route\nto host")
    with followed([feed(run_dir)], said.append, **FAST):
        wait_until(lambda: tracker.closed >= 3, "three attempts")
        assert said == ["tracker wandb: no route to host; the run goes on, and what is missing is sent later"]
        tracker.broken = None
        wait_until(lambda: len(said) > 1, "the tracker to be reached")
    assert said[1:] == ["tracker wandb: reached again, and what it missed is sent (5 lines)"]
    assert tracker.values[1, "loss/fake_score_loss"] == 0.5


def test_what_was_never_sent_is_named_at_the_end(run_dir: Path, tracker: KeepingTracker) -> None:
    said: list[str] = []
    tracker.broken = ConnectionError("no route to host")
    with followed([feed(run_dir)], said.append):
        pass
    assert len(said) == 2
    assert said[1] == f"tracker wandb: not everything was sent: `rtdmd track {run_dir} wandb` sends the rest"


def test_a_tracker_that_hangs_does_not_hold_the_run(
    run_dir: Path, tracker: KeepingTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "END_S", 0.1)
    go_on = Event()
    monkeypatch.setattr(tracker, "flush", go_on.wait)
    said: list[str] = []
    with followed([feed(run_dir)], said.append, **FAST):
        pass
    assert said == [f"tracker wandb: not everything was sent: `rtdmd track {run_dir} wandb` sends the rest"]
    go_on.set()
    wait_until(lambda: tracker.closed == 1, "the thread to end")


def test_an_error_of_the_run_passes(run_dir: Path, tracker: KeepingTracker) -> None:
    with pytest.raises(KeyboardInterrupt), followed([feed(run_dir)], pytest.fail):
        raise KeyboardInterrupt
    assert tracker.got[-1] == (4, "policies")
