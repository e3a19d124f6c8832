"""Means over seeds, and paired differences between two arms: the same prompts, noise and seeds in both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
"""The content of a result file, see `running.run_arm`."""


@dataclass(frozen=True)
class Difference:
    """A mean difference and its standard error."""

    mean: float
    error: float

    @property
    def errors(self) -> float:
        """The difference in standard errors."""
        return self.mean / self.error if self.error > 0 else 0.0


def scores_of(result: Result, policy: str, metric: str, rows: Sequence[int] | None = None) -> list[float]:
    """One value per prompt of the final table, the mean over its images; of these `rows` alone, if given."""
    record = result["policies"][policy]
    chosen = range(len(record["diversity"])) if rows is None else rows
    if metric == "diversity":
        return [record["diversity"][row] for row in chosen]
    return [statistics.fmean(record["scores"][row][metric]) for row in chosen]


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    """Mean of `ours - theirs`; each holds one list of prompts per seed, in the same order.

    The standard error is the larger of two: that over the prompts' means, and that over the seeds' means, which also
    has the chance in the training. A single seed has the first alone. With three seeds the second has two degrees of
    freedom: a difference of 4.3 standard errors has a two-sided p of 5 %.
    """
    seeds = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(ours, theirs, strict=True)]
    means = [statistics.fmean(values) for values in seeds]
    of_prompts = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
    over_prompts = statistics.stdev(of_prompts) / len(of_prompts) ** 0.5
    over_seeds = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return Difference(statistics.fmean(means), max(over_prompts, over_seeds))


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and, of several seeds, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"
