"""The thread that uses a worker's model: one call at a time, and its idle seconds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, get_ident

import pytest

from rollout_workers.model_thread import ModelThread
from tests.helpers.hand_clock import HandClock
from tests.helpers.waiting import wait_until


def test_all_work_runs_on_one_thread_and_never_two_at_once() -> None:
    model, used = ModelThread(), Lock()

    def work() -> int:
        assert used.acquire(blocking=False)
        used.release()
        return get_ident()

    with ThreadPoolExecutor(4) as callers:
        threads = set(callers.map(lambda _: model.run(work), range(100)))
    assert len(threads) == 1
    assert get_ident() not in threads


def test_idle_is_after_the_last_work_that_is_due() -> None:
    events: list[str] = []
    model = ModelThread(when_idle=lambda: events.append("idle"))
    begun, go_on = Event(), Event()

    def first() -> None:
        begun.set()
        assert go_on.wait(timeout=30)
        events.append("first")

    with ThreadPoolExecutor(2) as callers:
        one = callers.submit(model.run, first)
        assert begun.wait(timeout=30)
        two = callers.submit(model.run, lambda: events.append("second"))
        wait_until(lambda: model.due == 2, "the second work to be due")
        go_on.set()
        one.result(), two.result()
    assert events == ["first", "second", "idle"]


def test_idle_seconds_lie_between_two_uses() -> None:
    clock = HandClock()
    model = ModelThread(clock)

    def for_seconds(seconds: float) -> float:
        clock.now += seconds
        return seconds

    clock.now = 50.0
    assert model.run_timed(lambda: for_seconds(2.0)) == (2.0, 0.0)
    clock.now += 3.0
    assert model.run_timed(lambda: for_seconds(1.0)) == (1.0, 3.0)
    assert model.run_timed(lambda: for_seconds(1.0)) == (1.0, 0.0)


def test_an_error_is_raised_for_its_call_alone() -> None:
    model = ModelThread()
    with pytest.raises(ZeroDivisionError):
        model.run(lambda: 1 / 0)
    assert model.run(lambda: 7) == 7
