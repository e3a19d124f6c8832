"""Which call is next, whose are lost, and which one is given to a second worker."""

from __future__ import annotations

from collections.abc import Hashable

from learner.driver.call_queue import CALLS_PER_WORKER, SLOW_MIN_S, Attempt, Call, CallQueue
from learner.driver.fleet import Worker
from learner.driver.health import Pulse


def worker(place: int) -> Worker:
    return Worker(place, object(), Pulse(5.0, 0.0))  # type: ignore[arg-type]


def call(key: Hashable) -> Call:
    return Call(key, lambda _: [])


def queue(*keys: Hashable) -> CallQueue:
    found = CallQueue()
    for key in keys:
        found.add(call(key))
    return found


def started(calls: CallQueue, ready: list[Worker], now: float = 0.0) -> list[tuple[Hashable, int]]:
    """Everything that can be started now: keys and places."""
    return [(attempt.call.key, attempt.worker.place) for attempt in attempts(calls, ready, now)]


def attempts(calls: CallQueue, ready: list[Worker], now: float = 0.0) -> list[Attempt]:
    found = []
    while (attempt := calls.next(ready, now)) is not None:
        found.append(attempt)
    return found


def test_calls_go_to_the_least_loaded_worker_and_two_to_each() -> None:
    calls, ready = queue("a", "b", "c", "d", "e"), [worker(1), worker(2)]
    assert started(calls, ready) == [("a", 1), ("b", 2), ("c", 1), ("d", 2)]
    assert [calls.load(one) for one in ready] == [CALLS_PER_WORKER, CALLS_PER_WORKER]
    assert started(calls, [*ready, worker(3)]) == [("e", 3)]
    assert started(queue("a"), []) == []


def test_the_calls_of_a_worker_that_is_gone_come_first_and_in_order() -> None:
    calls, ready = queue("a", "b", "c", "d", "e"), [worker(1), worker(2)]
    started(calls, ready)
    assert calls.give_up(ready[0]) == 2
    assert started(calls, [worker(3)]) == [("a", 3), ("c", 3)]
    assert calls.give_up(worker(4)) == 0


def test_a_slow_call_is_given_to_an_idle_worker_as_well_once_and_the_first_result_counts() -> None:
    calls, ready = queue("a", "b"), [worker(1), worker(2)]
    slow, fast = attempts(calls, ready)
    assert calls.finish(fast, now=1.0)
    assert started(calls, ready, now=SLOW_MIN_S - 0.1) == []
    (again,) = attempts(calls, ready, now=SLOW_MIN_S + 0.1)
    assert (again.call.key, again.worker) == ("a", ready[1])
    assert started(calls, [*ready, worker(3)], now=100.0) == []
    assert calls.finish(again, now=12.0)
    assert calls.load(ready[0]) == 1, "its worker is still at work on it"
    assert calls.holds(slow)
    assert not calls.finish(slow, now=50.0)
    assert calls.load(ready[0]) == 0


def test_a_call_that_still_runs_elsewhere_is_not_lost_with_its_worker() -> None:
    calls, ready = queue("a", "b"), [worker(1), worker(2)]
    slow, fast = attempts(calls, ready)
    calls.finish(fast, now=1.0)
    (again,) = attempts(calls, ready, now=20.0)
    assert calls.give_up(slow.worker) == 0
    assert calls.finish(again, now=21.0)
    assert not calls.holds(slow)


def test_a_superseded_call_is_not_repeated_when_its_worker_goes() -> None:
    calls, ready = queue("a", "b"), [worker(1), worker(2)]
    slow, fast = attempts(calls, ready)
    calls.finish(fast, now=1.0)
    (again,) = attempts(calls, ready, now=20.0)
    calls.finish(again, now=21.0)
    assert calls.give_up(slow.worker) == 0
    assert started(calls, ready[1:], now=22.0) == []


def test_usual_seconds_set_what_is_slow() -> None:
    calls, ready = queue(*range(3)), [worker(1)]
    for end in (100.0, 200.0):  # each takes 100 s
        attempt = calls.next(ready, end - 100.0)
        assert attempt is not None
        calls.finish(attempt, end)
    third = calls.next(ready, 200.0)
    assert third is not None
    assert started(calls, [*ready, worker(2)], now=499.0) == []
    assert started(calls, [*ready, worker(2)], now=501.0) == [(2, 2)]
