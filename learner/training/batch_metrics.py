"""Metrics of a batch, merged from its parts: micro-batches and the ranks' shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.metric_names import SURROGATE_GAP

LARGEST = ("ratio_max_deviation", SURROGATE_GAP)
"""Metrics that are a maximum over samples; all others are means."""


class Totals:
    """Means over the samples that have a metric; maxima for `LARGEST`; sums for counts."""

    def __init__(self) -> None:
        self._unread: list[tuple[str, Tensor, float]] = []
        self._largest: dict[str, float] = {}
        self._sums: dict[str, float] = defaultdict(float)
        self._shares: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, metrics: Mapping[str, float | Tensor], share: float) -> None:
        """Add the metrics of a part that is this share of the batch. Tensors stay on their device until `read`."""
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                self._unread.append((name, value, share))
            else:
                self._add(name, value, share)

    def count(self, counts: Mapping[str, float]) -> None:
        """Add numbers that are summed over the parts."""
        for name, value in counts.items():
            self._counts[name] += value

    def read(self) -> None:
        """Read all tensors at once: the host waits for the device once, not for every metric."""
        unread, self._unread = self._unread, []
        if unread:
            values = torch.stack([value.float() for _, value, _ in unread]).tolist()
            for (name, _, share), value in zip(unread, values, strict=True):
                self._add(name, value, share)

    def values(self) -> dict[str, float]:
        self.read()
        means = {name: total / self._shares[name] for name, total in self._sums.items()}
        return means | self._largest | dict(self._counts)

    @staticmethod
    def merged(parts: Sequence[Totals]) -> Totals:
        """The totals of a batch from the totals of its parts."""
        total = Totals()
        for part in parts:
            part.read()
            for name, value in part._sums.items():
                total._sums[name] += value
                total._shares[name] += part._shares[name]
            total.add(part._largest, 1.0)
            total.count(part._counts)
        return total

    def _add(self, name: str, value: float, share: float) -> None:
        if name in LARGEST:
            self._largest[name] = max(self._largest.get(name, value), value)
        else:
            self._sums[name] += value * share
            self._shares[name] += share
