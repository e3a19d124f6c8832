"""Stops asking a server that keeps failing, and finds out when it is well again.

    closed ── FAILURES_TO_OPEN failures in a row ──► open ── a while ──► half-open: one request is the probe
      ▲                                               ▲                        │
      └────────────────── it succeeds ────────────────┼────────────────────────┤
                                                      └─ it fails: twice as long ┘

One breaker guards one replica of one reward. Times are seconds.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from enum import StrEnum

FAILURES_TO_OPEN = 3
"""In a row: fewer would open on one lost connection, more would let a dead server cost more attempts."""
FIRST_OPEN_S = 1.0
LONGEST_OPEN_S = 5.0
"""Between two probes at most, so that a server that is well again is found within twice this."""


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Thread-safe. Every request that `begin` let through must end in `succeeded` or `failed`.

    Args:
        clock: seconds, monotonic.
        draw: uniform in [0, 1); spreads the probes of many clients.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._draw = draw
        self._lock = threading.Lock()
        self._failures = 0
        self._open_s = FIRST_OPEN_S
        self._probe_at: float | None = None
        self._probing = False

    @property
    def state(self) -> BreakerState:
        with self._lock:
            return self._state()

    @property
    def seconds_to_probe(self) -> float:
        """How long until a request may be let through; 0 when one may now. A probe under way counts as soon over."""
        with self._lock:
            if self._probing:
                return FIRST_OPEN_S
            return 0.0 if self._probe_at is None else max(0.0, self._probe_at - self._clock())

    def begin(self) -> bool:
        """Whether a request may go out now; when half-open, the first to ask is the probe and the only one."""
        with self._lock:
            state = self._state()
            if state is BreakerState.CLOSED:
                return True
            if state is BreakerState.OPEN or self._probing:
                return False
            self._probing = True
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._open_s, self._probe_at, self._probing = 0, FIRST_OPEN_S, None, False

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._probing:
                self._open_s = min(2 * self._open_s, LONGEST_OPEN_S)
                self._open()
            elif self._probe_at is None and self._failures >= FAILURES_TO_OPEN:
                self._open()

    def _open(self) -> None:
        self._probing = False
        self._probe_at = self._clock() + self._open_s * (0.5 + 0.5 * self._draw())

    def _state(self) -> BreakerState:
        if self._probe_at is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._probing or self._clock() >= self._probe_at else BreakerState.OPEN
