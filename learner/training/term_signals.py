"""Measures each term's part in the student's gradient, and tells signal from noise.

    gradient of a term = gradient on the batch's first half + gradient on its second half

Noise differs between the halves, signal does not. So a term's signal is estimated as its norm times the root of the
halves' cosine. The cosine itself says whether a larger batch would help. This is measured in some iterations only: the
terms of the final step then need a backward pass each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from common.backbones.flat_adapter import FlatAdapter
from learner.metric_names import SIGNAL_COSINE, SIGNAL_NORM, SIGNAL_SHARE
from learner.training.ranks import Ranks

HALVES = (0, 1)


class TermSignals:
    """Collects the gradient of each term on each half of a batch, while it is added to the adapter's."""

    def __init__(self, adapter: FlatAdapter, terms: Sequence[str]) -> None:
        """`terms`: the names of all terms, on every rank in the same order."""
        self._adapter = adapter
        # On the host: six of them would be much memory of a GPU.
        self._halves_n = {(term, half): torch.zeros(len(adapter.gradient_n)) for term in terms for half in HALVES}
        self._terms = tuple(terms)

    def on(self, half: int) -> HalfSignals:
        return HalfSignals(self, half)

    @contextmanager
    def of(self, term: str, half: int) -> Iterator[None]:
        """Backward passes inside this block are of this term, on half 0 or 1 of the batch."""
        change_n = self._adapter.gradient_n.neg()
        yield
        self._halves_n[term, half] += change_n.add_(self._adapter.gradient_n).cpu()

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """For each term: its gradient's norm, its halves' cosine, and its share of the sum of the terms' signals.

        Raises:
            RankError: another rank is gone.
        """
        norms, cosines, signals = {}, {}, {}
        for term in self._terms:
            first_n, second_n = (ranks.total(self._halves_n[term, half]).double() for half in HALVES)
            norms[term], cosines[term] = float((first_n + second_n).norm()), _cosine(first_n, second_n)
            signals[term] = norms[term] * max(0.0, cosines[term]) ** 0.5
        total = sum(signals.values()) or 1.0
        return {
            f"{name}/{term}": values[term] / scale
            for name, values, scale in (
                (SIGNAL_NORM, norms, 1.0),
                (SIGNAL_COSINE, cosines, 1.0),
                (SIGNAL_SHARE, signals, total),
            )
            for term in self._terms
        }


@dataclass(frozen=True)
class HalfSignals:
    """`TermSignals` of one half of the batch."""

    signals: TermSignals
    half: int

    def of(self, term: str) -> AbstractContextManager[None]:
        """See `TermSignals.of`."""
        return self.signals.of(term, self.half)


def _cosine(first_n: Tensor, second_n: Tensor) -> float:
    size = float(first_n.norm() * second_n.norm())
    return float(first_n @ second_n) / size if size > 0 else 0.0
