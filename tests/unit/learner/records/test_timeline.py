"""The timeline of a run: stages, evaluations, outages from the metrics; restarts and alarms from the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.records.run_files import Record, read_metrics
from learner.records.timeline import Event, log_events, timeline
from tests.helpers.run_directory import STARTED, write_run


def train(stage: str, iteration: int, time: float | None, **metrics: float) -> Record:
    return Record(stage, iteration, "train", metrics, {"step": 1.0}, time)


def test_a_run_is_shown_with_its_events(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    events = log_events(directory / "logs" / "run.log")
    assert [event.kind for event in events] == ["restart", "alarm"]
    assert events[0].time == pytest.approx(STARTED + 23)
    text = timeline(read_metrics(directory), events)
    assert text.count('class="span ') == 2
    assert text.count('class="mark evaluation"') == 4
    assert text.count('class="mark outage"') == 1
    assert text.count('class="mark alarm"') == 1
    assert "iteration 7 of alignment: dropped groups 1" in text
    assert "gold fell by 0.06" in text
    assert "2027-01-15 07:59:59" in text  # the first iteration took the second before its record


def test_a_long_pause_ends_a_bar() -> None:
    records = [train("alignment", 0, 1e9), train("alignment", 1, 1e9 + 1), train("alignment", 2, 1e9 + 1000)]
    text = timeline(records, [])
    assert text.count('class="span ') == 2
    assert "iterations 0 to 1" in text
    assert "iterations 2 to 2" in text
    assert "No restart, outage or alarm." in text


def test_a_run_without_times_is_shown_by_seconds_of_training() -> None:
    records = [train("cold_start", 0, None), train("alignment", 0, None, **{"renormalised_groups/hps:timeout": 2.0})]
    text = timeline(records, [Event(1.7e9, "restart", "a worker is gone")])
    assert "By seconds of training" in text
    assert 'class="mark restart"' not in text  # it has no place on this axis
    assert "a worker is gone" in text
    assert "renormalised groups/hps:timeout 2" in text


def test_there_is_no_timeline_without_records_and_no_event_without_a_log(tmp_path: Path) -> None:
    assert timeline([], []) == ""
    assert log_events(tmp_path / "run.log") == []


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("rtdmd WARNING the run ends: interrupted", ["session"]),
        ("rtdmd WARNING the local reward server hps ended with exit status 1: it is started again", ["restart"]),
        ("rtdmd WARNING something unknown", ["other"]),
        ("rtdmd INFO learner.threads: 1", []),
        ("ray WARNING a worker restart", []),
    ],
)
def test_events_have_kinds(tmp_path: Path, line: str, kinds: list[str]) -> None:
    (tmp_path / "run.log").write_text(f"2026-11-30 09:35:53,605 {line}\n", encoding="utf-8")
    assert [event.kind for event in log_events(tmp_path / "run.log")] == kinds
