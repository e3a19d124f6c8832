"""Limits of a server: the requests it accepts, and the bytes it holds at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from common.errors import RewardOverloaded, RewardRejected
from reward_servers.batcher import RETRY_AFTER_SECONDS
from reward_servers.metrics import ScorerMetrics


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
    """The bytes that one scorer's requests hold, from each request's head to its response.

    A request reserves its bytes before they are read: memory stays bounded however many clients send at once.
    """

    def __init__(self, scorer: str, limit: int, metrics: ScorerMetrics) -> None:
        self._scorer = scorer
        self._limit = limit
        self._metrics = metrics
        self._held = 0

    @contextmanager
    def hold(self) -> Iterator[Holding]:
        """Release all that the block reserved at its end, or when the thread that reads the bytes ends."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            holding.when_unread(lambda: self._count(-holding.size))

    def take(self, size: int, more: int) -> None:
        """Take `more` bytes for a request of `size` bytes in total; RewardOverloaded when they do not fit now.

        RewardRejected when they can never fit: a 429 would make the client retry forever.
        """
        if size > self._limit:
            message = f"the request takes {size} bytes of memory, the limit is {self._limit}"
            raise RewardRejected(self._scorer, "too_large", f"{message}: send fewer images at once or raise --queue-mb")
        if more > 0 and self._held + more > self._limit:
            message = f"{self._held} bytes wait, {more} more exceed {self._limit}: try later"
            raise RewardOverloaded(self._scorer, "overloaded", message, RETRY_AFTER_SECONDS)
        self._count(more)

    def _count(self, size: int) -> None:
        self._held += size
        self._metrics.holding(self._held)


class Holding:
    """The bytes that one request holds of a budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._reading: Future[Any] | None = None
        self.size = 0

    def grow_to(self, size: int) -> None:
        """Take the bytes missing to `size`; raises as `ByteBudget.take`."""
        more = max(0, size - self.size)
        self._budget.take(size, more)
        self.size += more

    def read_by(self, work: Future[Any]) -> None:
        """Name the thread's work that reads the bytes now: they stay reserved until it ends, even without a client."""
        self._reading = work

    def when_unread(self, act: Callable[[], None]) -> None:
        """Call `act` in the event loop once no thread reads the bytes any more."""
        if self._reading is None or self._reading.done():
            act()
        else:
            loop = asyncio.get_running_loop()
            self._reading.add_done_callback(lambda _: None if loop.is_closed() else loop.call_soon_threadsafe(act))
