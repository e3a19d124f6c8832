"""Confidence intervals of the final table, and the policy that is best beyond noise.

The unit is the prompt: images of one prompt are similar, so an interval over images would be too narrow. Policies that
were evaluated on the same prompts and noise are compared prompt by prompt, others as independent samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from learner.records.run_files import PolicyResult

LEAST_PROMPTS = 5
"""With fewer prompts no difference is called more than noise: their spread says too little."""
STUDENT_T = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t, for 1 to 30 degrees of freedom."""
COUNTS = ("unscored",)
"""Metrics that are no quality: no policy is best in them."""


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; NaN where the spread is unknown."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width  # False for NaN


def interval(values_P: Sequence[float]) -> Interval:
    """The mean over prompts and its 95 % interval, by Student's t."""
    mean = statistics.fmean(values_P)
    if len(values_P) < 2:
        return Interval(mean, math.nan)
    return Interval(mean, t_95(len(values_P) - 1) * statistics.stdev(values_P) / math.sqrt(len(values_P)))


def t_95(degrees: int) -> float:
    """The two-sided 95 % quantile; beyond the table 1.96 (1 + 1.2 / degrees), which errs by less than 0.2 %."""
    return STUDENT_T[degrees - 1] if degrees <= len(STUDENT_T) else 1.96 * (1 + 1.2 / degrees)


def difference(one: PolicyResult, other: PolicyResult, metric: str) -> Interval:
    """`one` minus `other`: paired over the prompts that both have, if they share prompts and noise.

    Else as two independent samples, with the smaller one's degrees of freedom. The half width is NaN if the scores by
    prompt are not known, or if there are fewer than `LEAST_PROMPTS`.
    """
    ours, theirs = one.by_prompt.get(metric, {}), other.by_prompt.get(metric, {})
    unknown = Interval(one.metrics[metric] - other.metrics[metric], math.nan)
    if one.basis == other.basis:
        both = ours.keys() & theirs.keys()
        return interval([ours[place] - theirs[place] for place in both]) if len(both) >= LEAST_PROMPTS else unknown
    if min(len(ours), len(theirs)) < LEAST_PROMPTS:
        return unknown
    errors = [statistics.stdev(values.values()) / math.sqrt(len(values)) for values in (ours, theirs)]
    return Interval(unknown.mean, t_95(min(len(ours), len(theirs)) - 1) * math.hypot(*errors))


def winner(policies: Mapping[str, PolicyResult], metric: str) -> str:
    """The policy that is better than every other one by more than noise; "" if there is none."""
    known = {
        name: result
        for name, result in policies.items()
        if metric in result.metrics and math.isfinite(result.metrics[metric])
    }
    if metric in COUNTS or len(known) < 2:
        return ""
    best = max(known, key=lambda name: known[name].metrics[metric])
    others = [result for name, result in known.items() if name != best]
    apart = [difference(known[best], other, metric) for other in others]
    return best if all(gap.mean > 0 and gap.excludes_zero for gap in apart) else ""
