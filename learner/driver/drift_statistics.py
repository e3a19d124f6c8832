"""Tests of drift: whether a mean has moved beyond a tolerance, with the probability of a false alarm. Numbers only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom of that error."""

    mean: float
    error: float
    freedom: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The mean of independent values; at least two."""
        return cls(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5, len(values) - 1)

    @classmethod
    def joined(cls, parts: Sequence[Estimate]) -> Self:
        """The mean of independent estimates, with equal weights."""
        error = math.sqrt(sum(part.error**2 for part in parts)) / len(parts)
        return cls(statistics.fmean(part.mean for part in parts), error, _freedom(parts))

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates (Welch's t-test)."""
        error = math.hypot(self.error, other.error)
        return Estimate(self.mean - other.mean, error, _freedom([self, other]))


def _freedom(parts: Sequence[Estimate]) -> float:
    """Degrees of freedom of a sum, by Welch and Satterthwaite."""
    total = sum(part.error**2 for part in parts)
    if total == 0:
        return min(part.freedom for part in parts)
    return total**2 / sum(part.error**4 / part.freedom for part in parts)


def paired_change(now: Sequence[float | None], start: Sequence[float | None], kept: float = 1.0) -> Estimate | None:
    """Mean over prompts of `now - kept * start`, of those that have both; None for fewer than two."""
    pairs = [(a, b) for a, b in zip(now, start, strict=True) if a is not None and b is not None]
    return Estimate.of([a - kept * b for a, b in pairs]) if len(pairs) > 1 else None


def chance_of_rise(change: Estimate, tolerance: float = 0.0) -> float:
    """Largest probability of a change as high as this one, while the true one is at most `tolerance`: one-sided t-test.

    Without any spread the answer is 0 or 1.
    """
    excess = change.mean - tolerance
    if change.error == 0:
        return 0.0 if excess > 0 else 1.0
    return student_tail(excess / change.error, change.freedom)


def chance_of_fall(change: Estimate, tolerance: float = 0.0) -> float:
    """`chance_of_rise` of the opposite change: `tolerance` is the largest fall that is tolerated."""
    return chance_of_rise(Estimate(-change.mean, change.error, change.freedom), tolerance)


def student_tail(t: float, freedom: float) -> float:
    """Probability that Student's t is above `t`.

    Wallace's approximation of t by a normal variable (Ann. Math. Stat. 30, 1959). It overstates small probabilities: by
    at most 6 % from 14 degrees of freedom on and 45 % from 5 on, down to 1e-6. So false alarms are never more frequent.
    """
    normal = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return 0.5 * math.erfc(math.copysign(normal, t) / math.sqrt(2))
