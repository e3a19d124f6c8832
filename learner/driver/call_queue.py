"""Calls that wait for a worker, and calls that run: which one is next, whose are lost, which one is slow.

A call may run on two workers: a slow one, and an idle one that was given it as well. The first result counts.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from learner.driver.fleet import Worker

CALLS_PER_WORKER = 2
"""A worker runs this many calls at a time: one uses its model, while the other is scored or waits for the model."""
SLOW_FACTOR, SLOW_MIN_S = 3.0, 10.0
"""A call is slow when it has run for this many times the usual seconds, and at least for so many."""
RECENT = 32
"""The usual seconds are the median of so many calls."""


@dataclass(frozen=True)
class Call:
    """One remote call: `key` identifies it for the caller, `submit` starts it on a worker.

    The first reference that `submit` returns is small and fetched when ready; the others are not fetched.
    """

    key: Hashable
    submit: Callable[[ActorHandle], list[ray.ObjectRef]]


@dataclass(eq=False)
class Attempt:
    """A call on a worker.

    Attributes:
        since: when it was handed out.
        superseded: another worker was faster; this result will not be used.
    """

    call: Call
    worker: Worker
    since: float
    superseded: bool = False


class CallQueue:
    """Hands out calls in the order of their submission. Every method is a step of bookkeeping; nothing waits."""

    def __init__(self) -> None:
        self._waiting: deque[Call] = deque()
        self._of_worker: dict[Worker, list[Attempt]] = {}
        self._of_key: dict[Hashable, list[Attempt]] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def add(self, call: Call) -> None:
        self._waiting.append(call)

    def due(self) -> bool:
        """Whether a result is still to come."""
        return bool(self._waiting or self._of_key)

    def load(self, worker: Worker) -> int:
        """The number of calls that a worker holds."""
        return len(self._of_worker.get(worker, ()))

    def next(self, ready: Sequence[Worker], now: float) -> Attempt | None:
        """The oldest waiting call, or a slow one again, on the worker with the least to do; None without room."""
        worker = min(ready, key=self.load, default=None)
        if worker is None or self.load(worker) >= CALLS_PER_WORKER:
            return None
        if self._waiting:
            return self._begun(self._waiting.popleft(), worker, now)
        slow = None if self.load(worker) else self._slow(now)
        return None if slow is None else self._begun(slow, worker, now)

    def holds(self, attempt: Attempt) -> bool:
        """Whether its worker still has it."""
        return attempt in self._of_worker.get(attempt.worker, ())

    def finish(self, attempt: Attempt, now: float) -> bool:
        """A worker has finished a call; whether its result is the first."""
        self._of_worker[attempt.worker].remove(attempt)
        if attempt.superseded:
            return False
        for other in self._of_key.pop(attempt.call.key):
            other.superseded = other is not attempt
        self._seconds.append(now - attempt.since)
        return True

    def give_up(self, worker: Worker) -> int:
        """Take the calls of a worker that is gone back, ahead of those that wait; return how many."""
        lost = []
        for attempt in self._of_worker.pop(worker, []):
            if attempt.superseded:
                continue
            others = self._of_key[attempt.call.key]
            others.remove(attempt)
            if not others:
                del self._of_key[attempt.call.key]
                lost.append(attempt.call)
        self._waiting.extendleft(reversed(lost))
        return len(lost)

    def _begun(self, call: Call, worker: Worker, now: float) -> Attempt:
        attempt = Attempt(call, worker, now)
        self._of_worker.setdefault(worker, []).append(attempt)
        self._of_key.setdefault(call.key, []).append(attempt)
        return attempt

    def _slow(self, now: float) -> Call | None:
        """The oldest call that is slow, and runs on one worker alone."""
        if not self._seconds:
            return None
        limit_s = max(SLOW_MIN_S, SLOW_FACTOR * statistics.median(self._seconds))
        single = [attempts[0] for attempts in self._of_key.values() if len(attempts) == 1]
        oldest = min(single, key=lambda attempt: attempt.since, default=None)
        return oldest.call if oldest is not None and now - oldest.since > limit_s else None
