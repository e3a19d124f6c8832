"""Agreement of two sets of rewards on the order of the images of one prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from common.types import FloatArray

AGREEMENT = "agreement"
"""Name of `rank_agreement` among the statistics of a group and of an evaluation's prompt."""


def kendall(first_G: FloatArray, second_G: FloatArray) -> float | None:
    """Kendall's tau-b: 1 for the same order, -1 for the opposite one; None if one of them has no order (all equal)."""
    upper = np.triu_indices(len(first_G), 1)
    first, second = (np.sign(values[upper[0]] - values[upper[1]]) for values in (first_G, second_G))
    ordered = float(np.sqrt(np.abs(first).sum() * np.abs(second).sum()))
    return float((first * second).sum()) / ordered if ordered > 0 else None


def rank_agreement(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> float | None:
    """Mean Kendall's tau-b of pairs of rewards over the same G images; None if no pair has one."""
    found = [tau for first, second in pairs if (tau := kendall(first, second)) is not None]
    return statistics.fmean(found) if found else None
