"""Circuit breaker: stops sending requests to a failing server and detects when it is healthy again.

    closed ── FAILURES_TO_OPEN failures in a row, or a certain one ──► open ── a while ──► a check, out of band
      ▲                                                                 ▲                    │ the server answers
      │                                                                 ├── no answer:       ▼
      │                                                                 │   twice as long  half-open: one request
      └──────────────── the probe succeeds ─────────────────────────────┴── it fails ◄──── is the probe

A health check requests the server's identity, so no scoring request waits for a server that is still away. Only a
scoring request shows that scoring works, so exactly one is sent, as the probe. Each breaker guards one replica of one
reward. Times are in seconds.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from enum import StrEnum

FAILURES_TO_OPEN = 3
"""The breaker opens after this many failures in a row.

Fewer would open it on one lost connection. More would let a dead server cost more attempts.
"""
FIRST_OPEN_S = 1.0
LONGEST_OPEN_S = 5.0
"""An open breaker waits at most this long between two checks; a recovered server is found within twice this."""


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Thread-safe. A request that `begin` let through must end in `succeeded` or `failed`; a check in `checked`.

    Args:
        clock: seconds, monotonic.
        draw: uniform in [0, 1); spreads out the checks of many clients.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._draw = draw
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._open_s = FIRST_OPEN_S
        self._check_at = 0.0
        # True while the check of an open breaker, or the probe of a half-open one, is in flight.
        self._busy = False

    @property
    def state(self) -> BreakerState:
        with self._lock:
            return self._state

    @property
    def seconds_to_probe(self) -> float:
        """Seconds until the next request or check may begin; 0 when one may begin now."""
        with self._lock:
            if self._busy:
                return FIRST_OPEN_S
            return max(0.0, self._check_at - self._clock()) if self._state is BreakerState.OPEN else 0.0

    def begin_check(self) -> bool:
        """True if the caller must check the server's identity now; it must then call `checked`."""
        with self._lock:
            due = self._state is BreakerState.OPEN and not self._busy and self._clock() >= self._check_at
            self._busy = self._busy or due
            return due

    def checked(self, healthy: bool) -> None:
        with self._lock:
            if self._state is not BreakerState.OPEN:
                # An older request succeeded in the meantime.
                return
            if healthy:
                self._state, self._busy = BreakerState.HALF_OPEN, False
            else:
                self._open_longer()

    def begin(self) -> bool:
        """Whether a request may be sent now. When half-open, the first caller's request is the only one, the probe."""
        with self._lock:
            if self._state is BreakerState.OPEN or self._busy:
                return False
            self._busy = self._state is BreakerState.HALF_OPEN
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._state, self._failures, self._open_s, self._busy = BreakerState.CLOSED, 0, FIRST_OPEN_S, False

    def failed(self, *, certain: bool = False) -> None:
        """`certain`: one such failure is enough to open the breaker (no process listens)."""
        with self._lock:
            self._failures += 1
            if self._state is BreakerState.HALF_OPEN and self._busy:
                self._open_longer()
            elif self._state is BreakerState.CLOSED and (certain or self._failures >= FAILURES_TO_OPEN):
                self._open()

    def _open_longer(self) -> None:
        self._open_s = min(2 * self._open_s, LONGEST_OPEN_S)
        self._open()

    def _open(self) -> None:
        self._state, self._busy = BreakerState.OPEN, False
        self._check_at = self._clock() + self._open_s * (0.5 + 0.5 * self._draw())
