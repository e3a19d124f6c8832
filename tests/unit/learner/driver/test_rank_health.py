"""The rank of the learner that must be ended, by a hand-set clock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from common.heartbeat import Heartbeat, StepAtWork
from common.progress import STEP_LIMIT_S, WAIT_FOR_RANKS
from common.types import ProcessPlace
from learner.driver.rank_health import RankHealth
from tests.helpers.hand_clock import HandClock

AFTER_S = 5.0


class Rank:
    """A rank in this step; a silent one does not answer."""

    def __init__(self, number: int, step: str, limit_s: float = STEP_LIMIT_S) -> None:
        self.place = ProcessPlace("node", "host", number)
        self.steps = (StepAtWork(1, step, limit_s),)
        self.silent, self.cpu_per_s = False, 0.0
        self.pings = 0

    @property
    def heartbeat(self) -> Rank:
        return self

    def options(self, **_: object) -> Rank:
        return self

    def remote(self) -> Rank:
        self.pings += 1
        return self

    def future(self) -> Future[Heartbeat]:
        answer: Future[Heartbeat] = Future()
        if not self.silent:
            answer.set_result(Heartbeat(self.place, self.steps))
        return answer


class Machines:
    def __init__(self, ranks: list[Rank], clock: HandClock) -> None:
        self._ranks, self._clock = {rank.place: rank for rank in ranks}, clock

    def cpu_seconds(self, place: ProcessPlace, then: Callable[[float], None]) -> None:
        then(self._ranks[place].cpu_per_s * self._clock.now)

    def end(self, place: ProcessPlace) -> None:
        """There is no process."""

    def kill(self, actor: object) -> None:
        """There is no actor."""


def watched(*ranks: Rank, until: float, proven: bool = True) -> tuple[float, str]:
    """When a fault is found, and which; looked at every quarter of a second while a call is due."""
    clock = HandClock(1000.0)
    health = RankHealth(Machines(list(ranks), clock), AFTER_S, clock)
    handles: Any = ranks
    health.follow(handles, [rank.place for rank in ranks])
    if proven:
        health.begin()
        health.finished()
    clock.now += 100.0  # without a call nobody is asked, and silence is no sign
    health.begin()
    begun = clock.now
    while clock.now - begun < until:
        clock.now += 0.25
        fault = health.fault()
        if fault:
            return clock.now - begun, fault
    return until, ""


def test_a_frozen_rank_is_found_and_named() -> None:
    healthy, frozen = Rank(0, WAIT_FOR_RANKS, float("inf")), Rank(1, "student")
    frozen.silent = True
    seconds, fault = watched(healthy, frozen, until=20.0)
    assert AFTER_S <= seconds <= AFTER_S + 0.5
    assert fault == f"rank 1 (host:1): it has not answered for {seconds:.0f} s, and uses no processor"
    assert frozen.pings == 1


def test_a_busy_rank_that_cannot_answer_is_left_alone() -> None:
    busy = Rank(0, "student")
    busy.silent, busy.cpu_per_s = True, 0.5
    assert watched(busy, until=50.0) == (50.0, "")


def test_a_rank_that_has_not_finished_a_call_may_be_silent() -> None:
    loading = Rank(0, "cold_start")
    loading.silent = True
    assert watched(loading, until=50.0, proven=False) == (50.0, "")


def test_a_rank_that_gets_no_further_is_found_and_not_the_one_that_waits_for_it() -> None:
    seconds, fault = watched(Rank(0, WAIT_FOR_RANKS, float("inf")), Rank(1, "student"), until=100.0)
    assert STEP_LIMIT_S < seconds <= STEP_LIMIT_S + AFTER_S
    assert fault.startswith("rank 1 (host:1): it gets no further in its step student for 6")


def test_ranks_that_wait_for_each_other_are_found() -> None:
    ranks = [Rank(number, WAIT_FOR_RANKS, float("inf")) for number in range(2)]
    seconds, fault = watched(*ranks, until=100.0)
    assert STEP_LIMIT_S < seconds <= STEP_LIMIT_S + 2.0
    assert fault.startswith("its ranks have waited for each other for 6")
