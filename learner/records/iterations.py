"""Iterations of a run as its console shows them: their number, the time left, and whether a figure rises."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from enum import Enum

RECENT = 10
"""Values that the newest mean is of. It is compared with the mean of as many before."""
FEWEST = 3
CERTAIN = 2.0
"""A difference of fewer standard errors is no trend."""
TIMED = 50
"""Iterations whose time predicts the rest. Evaluations and checkpoints between them count."""


class Trend(Enum):
    """Where a figure goes. UNKNOWN until there are enough values."""

    UP = 1
    DOWN = -1
    FLAT = 0
    UNKNOWN = None


class Iterations:
    """Counts iterations and remembers figures."""

    def __init__(self, iterations: Mapping[str, int]) -> None:
        """`iterations`: stage -> its number of iterations."""
        self._iterations = iterations
        self._stage, self._done = "", 0
        self._ends: deque[float] = deque(maxlen=TIMED)
        self._seconds = 0.0
        self._values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=2 * RECENT))

    def __str__(self) -> str:
        total = self._iterations.get(self._stage)
        return f"{self._stage} {self._done}{'' if total is None else f'/{total}'}"

    def finished(self, record: Mapping[str, float], stage: str, iteration: int, now: float) -> None:
        """An iteration, counted from 0, has ended at `now` seconds."""
        if stage != self._stage:
            self._stage = stage
            self._ends.clear()
        self._done, self._seconds = iteration + 1, record.get("seconds/step", 0.0)
        self._ends.append(now)
        for name, value in record.items():
            self.seen(name, value)

    def seen(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def left_s(self) -> float | None:
        """Seconds to the end of the stage; None where the stage's iterations are unknown."""
        total = self._iterations.get(self._stage)
        if total is None:
            return None
        each = self._seconds
        if len(self._ends) > 1:
            each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0, total - self._done) * each

    def trend(self, name: str) -> Trend:
        """Compares the newest values with those before, against their standard error."""
        values = [value for value in self._values[name] if math.isfinite(value)]
        half = min(RECENT, len(values) // 2)
        if half < FEWEST:
            return Trend.UNKNOWN
        newest, before = values[-half:], values[-2 * half : -half]
        difference = _mean(newest) - _mean(before)
        error = math.sqrt((_variance(newest) + _variance(before)) / half)
        if difference == 0 or abs(difference) < CERTAIN * error:
            return Trend.FLAT
        return Trend.UP if difference > 0 else Trend.DOWN


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _variance(values: list[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
