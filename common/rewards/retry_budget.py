"""Limits how often, and after what delay, a failed request is retried.

A client's retries may add at most `RETRY_SHARE` to its requests, so that servers that fail under load are not loaded
more by retries. Delays have full jitter, uniform in [0, cap): clients refused together must not return together.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

RETRY_SHARE = 0.1
RETRY_RESERVE = 2.0
"""A client may make this many retries before its first request has earned any."""
LARGEST_RESERVE = 10.0
"""The budget saves up at most this many retries, so that an hour without failures is not spent in one second."""
BACKOFF_BASE_S = 0.1
BACKOFF_LIMIT_S = 5.0


@dataclass(frozen=True)
class Timing:
    """Clock (seconds, monotonic), sleep and random draw (uniform in [0, 1)); tests substitute their own."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random

    def backoff_s(self, number: int) -> float:
        """Seconds to wait after the `number`-th failure (from 1)."""
        return self.draw() * min(BACKOFF_LIMIT_S, BACKOFF_BASE_S * 2.0 ** min(number, 16))


class RetryBudget:
    """Earned by requests, spent by retries; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = RETRY_RESERVE

    def earn(self) -> None:
        """Record a request's first attempt."""
        with self._lock:
            self._left = min(self._left + RETRY_SHARE, LARGEST_RESERVE)

    def spend(self) -> bool:
        """Take one retry from the budget; False when none is left."""
        with self._lock:
            # Ten times 0.1 is slightly less than one.
            affordable = self._left > 1.0 - 1e-9
            if affordable:
                self._left -= 1.0
        return affordable
