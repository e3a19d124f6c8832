"""The thread that uses a worker's model: one call at a time, and its idle seconds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock, get_ident

import pytest

from rollout_workers.model_thread import ModelThread
from tests.helpers.hand_clock import HandClock


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
