"""What a server accepts, and the bytes it holds at once."""

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
    """Of one request.

    Attributes:
        max_body_bytes: of its body, and of its images once decoded.
        max_pixels: of each of its images.
        deadline_s: seconds until it must be answered; a client may ask for less.
        token: bearer token; None: none is asked for.
    """

    max_body_bytes: int
    max_pixels: int
    deadline_s: float
    token: str | None


class ByteBudget:
    """Bytes held by the requests of one scorer, from the head of each until its answer.

    A request asks for its bytes before they are read: memory stays bounded however many clients send at once.
    """

    def __init__(self, scorer: str, limit: int, metrics: ScorerMetrics) -> None:
        self._scorer = scorer
        self._limit = limit
        self._metrics = metrics
        self._held = 0

    @contextmanager
    def hold(self) -> Iterator[Holding]:
        """What is taken inside the block is given back at its end, or when the thread that reads the bytes ends."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            holding.when_unread(lambda: self._count(-holding.size))

    def take(self, size: int, more: int) -> None:
        """Take `more` bytes for a request of `size` bytes in all: RewardOverloaded when that is too many now.

        RewardRejected when it is too many ever: it would be told to come back for ever.
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
    """One request's part of a budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._reading: Future[Any] | None = None
        self.size = 0

    def grow_to(self, size: int) -> None:
        """Take what is missing to `size` bytes; raises as `ByteBudget.take`."""
        more = max(0, size - self.size)
        self._budget.take(size, more)
        self.size += more

    def read_by(self, work: Future[Any]) -> None:
        """Names the thread's work that looks at the bytes now: a client may leave before it is done, they may not."""
        self._reading = work

    def when_unread(self, act: Callable[[], None]) -> None:
        """`act`, in the event loop, once no thread looks at the bytes any more."""
        if self._reading is None or self._reading.done():
            act()
        else:
            loop = asyncio.get_running_loop()
            self._reading.add_done_callback(lambda _: None if loop.is_closed() else loop.call_soon_threadsafe(act))
