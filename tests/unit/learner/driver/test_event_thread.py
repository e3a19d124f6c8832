"""Events run in order in one thread; another thread waits for what they change, and gets their errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread

import pytest

from learner.driver.event_thread import EventThread


@contextmanager
def started(check: object = None) -> Iterator[EventThread]:
    events = EventThread("events of a test")
    events.start(check or (lambda: None), 1000.0)  # type: ignore[arg-type]
    try:
        yield events
    finally:
        events.stop()


def test_events_run_in_order_in_the_thread_and_wake_the_one_that_waits() -> None:
    seen: list[tuple[int, str]] = []

    def note(number: int) -> None:
        with events.changing():
            seen.append((number, current_thread().name))

    with started() as events:
        for number in range(3):
            events.put(lambda number=number: note(number))  # type: ignore[misc]
        assert events.until(lambda: seen[2] if len(seen) == 3 else None) == (2, "events of a test")
    assert [number for number, _ in seen] == [0, 1, 2]


def test_the_check_runs_at_the_start() -> None:
    checked = Event()
    with started(checked.set):
        assert checked.wait(60)


def test_the_error_of_an_event_is_raised_where_another_thread_waits() -> None:
    def fail() -> None:
        raise ValueError("of the event")

    with started() as events:
        events.put(fail)
        with pytest.raises(ValueError, match="of the event"):
            events.until(lambda: None)
        with pytest.raises(ValueError, match="of the event"):
            events.raise_error()


def test_what_is_there_is_found_after_an_error_and_at_the_end_of_the_time() -> None:
    with started() as events:
        assert events.until(lambda: "found", 0.0) == "found"
        assert events.until(lambda: None, 0.0) is None
