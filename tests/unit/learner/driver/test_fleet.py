"""Places that start workers, and how often."""

from __future__ import annotations

import pytest

from common.errors import WorkerError
from common.types import ProcessPlace
from learner.driver.fleet import WINDOW_S, Fleet
from tests.helpers.hand_clock import HandClock


def fleet(places: int, restarts: int) -> tuple[Fleet, HandClock]:
    clock = HandClock()
    return Fleet(lambda _: object(), places, restarts, 5.0, clock), clock  # type: ignore[arg-type]


def test_every_place_starts_one_worker_and_a_lost_one_is_replaced() -> None:
    workers, _ = fleet(places=2, restarts=1)
    first, second = workers.start_due()
    assert (first.place, second.place) == (1, 2)
    assert workers.start_due() == []
    assert workers.ready == []
    second.process = ProcessPlace("node", "host", 7)
    assert workers.ready == [second]
    assert str(second) == "worker 2 (host:7)"
    assert workers.remove(first, "it died")
    assert not workers.remove(first, "it died")
    (third,) = workers.start_due()
    assert third.place == 1
    assert workers.workers == [third, second]


def test_a_place_rests_after_its_restarts_and_starts_again_later() -> None:
    workers, clock = fleet(places=1, restarts=2)
    for start in range(3):
        clock.now = 10.0 * start
        (worker,) = workers.start_due()
        workers.remove(worker, "out of memory")
    assert workers.outlook(1) == f"its place rests for {WINDOW_S - 20:.0f} s (workers.restarts = 2)"
    clock.now = WINDOW_S - 0.1
    assert workers.start_due() == []
    clock.now = WINDOW_S
    assert len(workers.start_due()) == 1
    workers.require_hope()


def test_without_a_worker_and_without_a_start_there_is_no_hope() -> None:
    workers, _ = fleet(places=2, restarts=0)
    first, second = workers.start_due()
    workers.remove(first, "it died")
    workers.require_hope()
    workers.remove(second, "out of memory")
    workers.start_due()
    with pytest.raises(WorkerError, match=r"workers\.restarts = 0\).*--resume; worker 2: out of memory"):
        workers.require_hope()


def test_places_have_a_state_and_a_replacement_is_known() -> None:
    workers, clock = fleet(places=3, restarts=1)
    first, second, _ = workers.start_due()
    assert workers.states(0.0) == {"loading": 3, "missing": 0}
    first.process = second.process = ProcessPlace("node", "host", 7)
    clock.now = 100.0
    first.pulse.rested(clock.now)
    assert workers.states(clock.now) == {"ready": 1, "unhealthy": 1, "loading": 1, "missing": 0}
    workers.remove(second, "it died")
    assert workers.states(clock.now) == {"ready": 1, "loading": 1, "missing": 1}
    (third,) = workers.start_due()
    assert (first.replaces, third.replaces) == (False, True)


def test_more_places_start_more_workers() -> None:
    workers, _ = fleet(places=1, restarts=0)
    (first,) = workers.start_due()
    workers.resize(3)
    assert [worker.place for worker in workers.start_due()] == [2, 3]
    assert (workers.leaving, workers.workers[0]) == ([], first)


def test_a_closed_place_keeps_its_worker_until_it_is_removed() -> None:
    workers, _ = fleet(places=3, restarts=3)
    first, second, third = workers.start_due()
    for worker in (first, second, third):
        worker.process = ProcessPlace("node", "host", worker.place)
    workers.resize(1)
    assert (workers.ready, workers.leaving) == ([first], [second, third])
    workers.remove(third, "it left")
    assert workers.outlook(3) == "its place was closed"
    assert workers.start_due() == []
    workers.resize(2)
    assert (workers.ready, workers.leaving) == ([first, second], [])
    workers.remove(first, "it died")
    assert [worker.place for worker in workers.start_due()] == [1]
    assert workers.states(0.0)["missing"] == 0


def test_an_empty_place_that_closes_is_no_missing_one() -> None:
    workers, _ = fleet(places=2, restarts=0)
    _, second = workers.start_due()
    workers.remove(second, "it died")
    assert workers.states(0.0)["missing"] == 1
    workers.resize(1)
    assert workers.states(0.0)["missing"] == 0
