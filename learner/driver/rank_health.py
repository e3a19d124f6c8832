"""Follows the ranks of the learner while one of their calls is due, and finds the one that must be ended.

Signs and limits are those of workers (`learner/driver/health.py`). A rank that waits for another one is not at fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from ray.actor import ActorHandle

from common.heartbeat import Heartbeat
from common.progress import STEP_LIMIT_S, WAIT_FOR_RANKS
from common.types import ProcessPlace
from learner.driver.health import Pulse
from learner.driver.machines import Machines
from learner.driver.worker_pool import HEALTH, PINGS


@dataclass(eq=False)
class _Rank:
    number: int
    handle: ActorHandle
    place: ProcessPlace
    pulse: Pulse
    asked: bool = False
    pinged_at: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.number} ({self.place})"


class RankHealth:
    """Pings ranks that have work. Answers arrive on other threads and wait in a queue for `fault`."""

    def __init__(
        self, machines: Machines, unhealthy_after_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._machines, self._clock = machines, clock
        self._unhealthy_after_s = unhealthy_after_s
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ranks: list[_Rank] = []
        self._waiting_steps: list[int] = []
        self._waiting_since = clock()

    def follow(self, handles: Sequence[ActorHandle], places: Sequence[ProcessPlace]) -> None:
        """Follow these ranks from now on, and no others."""
        now = self._clock()
        self._ranks = [
            _Rank(number, handle, place, Pulse(self._unhealthy_after_s, now))
            for number, (handle, place) in enumerate(zip(handles, places, strict=True))
        ]

    def begin(self) -> None:
        """A call has been made: silence until now was no sign."""
        now = self._clock()
        for rank in self._ranks:
            rank.pulse.rested(now)

    def finished(self) -> None:
        """The call has been answered."""
        for rank in self._ranks:
            rank.pulse.proven = True

    def fault(self) -> str:
        """Ping the ranks; which one must be ended, and why; "" while none need be."""
        self._hear_all()
        now = self._clock()
        for rank in self._ranks:
            if not rank.asked and now - rank.pinged_at >= self._unhealthy_after_s / PINGS:
                rank.asked, rank.pinged_at = True, now
                answer = rank.handle.heartbeat.options(concurrency_group=HEALTH).remote().future()
                answer.add_done_callback(partial(self._heard, rank))
            if rank.pulse.is_doubtful(now):
                self._machines.cpu_seconds(rank.place, partial(self._seen, rank))
            found = rank.pulse.fault(now)
            if found:
                return f"{rank}: {found}"
        return self._deadlock(now)

    def _deadlock(self, now: float) -> str:
        """Whether all ranks wait for each other, and have done so for the limit of a step."""
        steps = [step for rank in self._ranks for step in rank.pulse.at_work]
        waiting = [step.number for step in steps if step.name == WAIT_FOR_RANKS]
        if not waiting or len(waiting) < len(steps) or waiting != self._waiting_steps:
            self._waiting_steps, self._waiting_since = waiting, now
        waited_s = now - self._waiting_since
        return f"its ranks have waited for each other for {waited_s:.0f} s" if waited_s > STEP_LIMIT_S else ""

    def _hear_all(self) -> None:
        with suppress(Empty):
            while True:
                self._events.get_nowait()()

    def _heard(self, rank: _Rank, answer: Future[Heartbeat]) -> None:
        self._events.put(partial(self._hear, rank, answer))

    def _hear(self, rank: _Rank, answer: Future[Heartbeat]) -> None:
        rank.asked = False
        if answer.exception() is None:
            rank.pulse.answered(answer.result(), self._clock())

    def _seen(self, rank: _Rank, seconds: float) -> None:
        self._events.put(partial(rank.pulse.used_cpu, seconds, self._clock()))
