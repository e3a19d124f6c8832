"""How often, and after how long, a failed request is tried again.

A client may add at most `RETRY_SHARE` to the traffic it causes anyway: servers that fail under load are not loaded more
for it. Waiting times have full jitter, uniform in [0, cap): a crowd refused together must not come back together.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

RETRY_SHARE = 0.1
RETRY_RESERVE = 2.0
"""Tries again that a client may make before it has asked anything else: the first question has earned none yet."""
LARGEST_RESERVE = 10.0
"""What an hour without failures may save up, so that it is not all spent in one second."""
BACKOFF_BASE_S = 0.1
BACKOFF_LIMIT_S = 5.0


@dataclass(frozen=True)
class Timing:
    """Clock (seconds, monotonic), sleep and random draw (uniform in [0, 1)); tests give their own."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random

    def backoff_s(self, number: int) -> float:
        """Seconds to wait after failure `number` (from 1)."""
        return self.draw() * min(BACKOFF_LIMIT_S, BACKOFF_BASE_S * 2.0 ** min(number, 16))


class RetryBudget:
    """Earned by questions, spent by repetitions; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = RETRY_RESERVE

    def earn(self) -> None:
        """A question is asked for the first time."""
        with self._lock:
            self._left = min(self._left + RETRY_SHARE, LARGEST_RESERVE)

    def spend(self) -> bool:
        """Whether one request more may be sent."""
        with self._lock:
            # Ten times a tenth is a little less than one.
            affordable = self._left > 1.0 - 1e-9
            if affordable:
                self._left -= 1.0
        return affordable
