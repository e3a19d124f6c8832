"""What a server accepts, and the bytes it holds at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import RewardOverloaded
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
        """What is taken inside the block is given back at its end."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            self.take(-holding.size)

    def take(self, size: int) -> None:
        """RewardOverloaded when `size` bytes more are too many."""
        if size > 0 and self._held + size > self._limit:
            message = f"{self._held} bytes wait, {size} more exceed {self._limit}: try later"
            raise RewardOverloaded(self._scorer, "overloaded", message, RETRY_AFTER_SECONDS)
        self._held += size
        self._metrics.holding(self._held)


class Holding:
    """One request's part of a budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.size = 0

    def grow_to(self, size: int) -> None:
        """Take what is missing to `size` bytes; RewardOverloaded when there is no room."""
        more = max(0, size - self.size)
        self._budget.take(more)
        self.size += more
