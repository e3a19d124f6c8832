"""Limits of a server: the requests it accepts, the bytes it holds at once, and the time that reading them may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import RewardOverloaded, RewardRejected, RewardUnavailable
from common.rewards.api import ANY_REWARD
from reward_servers.batcher import RETRY_AFTER_SECONDS
from reward_servers.metrics import ScorerMetrics

READERS = 2
"""There are few reader threads, because they take cores and memory bandwidth from the model."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request.

    Attributes:
        max_body_bytes: limit of its body, and of its decoded images.
        max_pixels: limit of each of its images.
        deadline_s: seconds until it must be answered; a client may ask for less.
        token: required bearer token; None requires none.
    """

    max_body_bytes: int
    max_pixels: int
    deadline_s: float
    token: str | None


class ByteBudget:
    """The bytes that one scorer's requests hold, from their arrival until the answer has left.

    A request holds what has arrived of it, never what it only declares: who sends nothing takes nothing.
    """

    def __init__(self, scorer: str, limit: int, metrics: ScorerMetrics) -> None:
        self._scorer = scorer
        self._limit = limit
        self._metrics = metrics
        self._held = 0

    def require_room(self, size: int, more: int) -> None:
        """RewardOverloaded when `more` bytes for a request of `size` bytes in total do not fit now.

        RewardRejected when they can never fit: a 429 would make the client retry forever.
        """
        if size > self._limit:
            message = f"the request takes {size} bytes of memory, the limit is {self._limit}"
            raise RewardRejected(self._scorer, "too_large", f"{message}: send fewer images at once or raise --queue-mb")
        if more > 0 and self._held + more > self._limit:
            message = f"{self._held} bytes wait, {more} more exceed {self._limit}: try later"
            raise RewardOverloaded(self._scorer, "overloaded", message, RETRY_AFTER_SECONDS)

    def count(self, size: int) -> None:
        self._held += size
        self._metrics.holding(self._held)


class Holding:
    """The bytes that one request holds of a budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._reading: Future[Any] | None = None
        self._size = 0

    def require_room(self, size: int) -> None:
        """Raise as `ByteBudget.require_room` if the request cannot grow to `size`; take nothing yet."""
        self._budget.require_room(size, size - self._size)

    def grow_to(self, size: int) -> None:
        """Take the bytes missing to `size`; raises as `ByteBudget.require_room`."""
        more = size - self._size
        if more > 0:
            self._budget.require_room(size, more)
            self._size = size
            self._budget.count(more)

    def read_by(self, work: Future[Any]) -> None:
        """Name the thread's work that reads the bytes now: they stay held until it ends, even without a client."""
        self._reading = work

    def release(self) -> None:
        """Give all bytes back, once no thread reads them any more."""
        if self._reading is None or self._reading.done():
            self._give_back()
        else:
            loop = asyncio.get_running_loop()
            self._reading.add_done_callback(
                lambda _: None if loop.is_closed() else loop.call_soon_threadsafe(self._give_back)
            )

    def _give_back(self) -> None:
        size, self._size = self._size, 0
        self._budget.count(-size)


class Patience:
    """The end of the time that a request's reading may take: its deadline, or the hang-up of its client."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + seconds

    def end(self) -> None:
        self._until = float("-inf")

    def check(self) -> None:
        """RewardUnavailable once it is over; called by the reading thread between its steps."""
        if self._clock() > self._until:
            raise RewardUnavailable(ANY_REWARD, "deadline", "the request was not read within its deadline")


class Readers:
    """A few threads that read bodies and write large answers, because both would block the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._clock = clock
        self._began: dict[int, float] = {}
        self._count = 0

    @property
    def call_seconds(self) -> float:
        """Seconds that the oldest work has been running; 0 when none is."""
        began = list(self._began.values())
        return self._clock() - min(began) if began else 0.0

    @property
    def busy(self) -> bool:
        return bool(self._began)

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        self._count += 1
        return self._threads.submit(self._timed, self._count, call)

    def close(self) -> None:
        """Release the threads without waiting for work in progress."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _timed(self, number: int, call: Callable[[], Result]) -> Result:
        self._began[number] = self._clock()
        try:
            return call()
        finally:
            del self._began[number]
