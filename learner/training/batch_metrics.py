"""Metrics of a batch, merged from its parts: micro-batches and the ranks' shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

LARGEST = ("ratio_max_deviation", "surrogate_gap")
"""Metrics that are a maximum over samples; all others are means."""


class Totals:
    """Means over the samples that have a metric; maxima for `LARGEST`; sums for counts."""

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}
        self._sums: dict[str, float] = defaultdict(float)
        self._shares: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, metrics: Mapping[str, float], share: float) -> None:
        """Add the metrics of a part that is this share of the batch."""
        for name, value in metrics.items():
            if name in LARGEST:
                self._largest[name] = max(self._largest.get(name, value), value)
            else:
                self._sums[name] += value * share
                self._shares[name] += share

    def count(self, counts: Mapping[str, float]) -> None:
        """Add numbers that are summed over the parts."""
        for name, value in counts.items():
            self._counts[name] += value

    def values(self) -> dict[str, float]:
        means = {name: total / self._shares[name] for name, total in self._sums.items()}
        return means | self._largest | dict(self._counts)

    @staticmethod
    def merged(parts: Sequence[Totals]) -> Totals:
        """The totals of a batch from the totals of its parts."""
        total = Totals()
        for part in parts:
            for name, value in part._sums.items():
                total._sums[name] += value
                total._shares[name] += part._shares[name]
            total.add(part._largest, 1.0)
            total.count(part._counts)
        return total
