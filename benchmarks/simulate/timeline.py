"""Virtual time: events happen in the order of their times, and nobody waits for a clock.

The driver's code runs on it unchanged. It reads the time from `Timeline`, the pool's events run in `VirtualEvents`, and
whatever the driver waits for lets virtual time pass. The driver's own computing takes no virtual time. Its processor
seconds are measured instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from typing import TypeVar

Found = TypeVar("Found")


class Timeline:
    """A clock in virtual seconds, and what is to happen.

    Attributes:
        now: seconds since the start.
        simulated_cpu_s: processor seconds that the simulated parts took, which a real driver does not spend.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.simulated_cpu_s = 0.0
        self._numbers = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Have something happen in the simulated world."""
        self.driver_after(seconds, lambda: self._timed(then))

    def driver_after(self, seconds: float, then: Callable[[], None]) -> None:
        """Have code of the driver run; its processor seconds are the driver's."""
        heappush(self._due, (self.now + seconds, next(self._numbers), then))

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.until(lambda: None, seconds)

    def until(self, look: Callable[[], Found | None], seconds: float | None = None) -> Found | None:
        """Let time pass until `look` finds something, and return it; None after so many seconds."""
        end = None if seconds is None else self.now + seconds
        while (found := look()) is None:
            if end is not None and (not self._due or self._due[0][0] > end):
                self.now = end
                return None
            if not self._due:
                raise RuntimeError(f"nothing is left to happen at {self.now:.3f} s, and something is waited for")
            self.now, _, then = heappop(self._due)
            then()
        return found

    def _timed(self, then: Callable[[], None]) -> None:
        started = time.process_time()
        then()
        self.simulated_cpu_s += time.process_time() - started


class VirtualEvents:
    """`learner.driver.event_thread.Events` in virtual time. Errors come to the driver as they are raised."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._open = False
        self._changes = 0

    def start(self, check: Callable[[], None], every_s: float) -> None:
        def checked() -> None:
            if self._open:
                check()
                self._timeline.driver_after(every_s, checked)

        self._open = True
        self._timeline.driver_after(0.0, checked)

    def stop(self) -> None:
        self._open = False

    def put(self, event: Callable[[], None]) -> None:
        self._timeline.driver_after(0.0, lambda: event() if self._open else None)

    @contextmanager
    def changing(self) -> Iterator[None]:
        yield
        self._changes += 1

    def raise_error(self) -> None:
        """Nothing: see above."""

    def until(self, look: Callable[[], Found | None], seconds: float | None = None) -> Found | None:
        seen = -1

        def look_at_change() -> Found | None:
            nonlocal seen
            if seen == self._changes:
                return None
            seen = self._changes
            return look()

        return self._timeline.until(look_at_change, seconds)
