"""Totals of a batch: what is a mean, a maximum or a sum, and when tensors are read."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.training.batch_metrics import Totals


def test_means_are_over_the_parts_that_have_the_metric() -> None:
    totals = Totals()
    totals.add({"loss": 4.0, "rare": 2.0, "surrogate_gap": 0.5}, 0.25)
    totals.add({"loss": torch.tensor(8.0), "surrogate_gap": torch.tensor(0.25)}, 0.75)
    totals.count({"left_out": 1.0})
    totals.count({"left_out": 2.0})
    # (4 / 4 + 8 * 3 / 4) = 7; the rare one is the mean of its only part.
    assert totals.values() == {"loss": 7.0, "rare": 2.0, "surrogate_gap": 0.5, "left_out": 3.0}


def test_the_ranks_totals_are_one_batch() -> None:
    parts = [Totals(), Totals()]
    parts[0].add({"loss": torch.tensor(1.0), "surrogate_gap": torch.tensor(3.0)}, 0.5)
    parts[1].add({"loss": torch.tensor(2.0), "surrogate_gap": torch.tensor(4.0)}, 0.5)
    assert Totals.merged(parts).values() == {"loss": 1.5, "surrogate_gap": 4.0}


class CountedReads(Tensor):
    """Counts how often the host asks for values."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (Tensor.tolist, Tensor.item, Tensor.__float__):
            cls.reads += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_all_tensors_are_read_at_once() -> None:
    totals = Totals()
    for value in (1.0, 3.0):
        totals.add({"loss": torch.tensor(value).as_subclass(CountedReads), "other": 1.0}, 0.5)
    assert CountedReads.reads == 0
    totals.read()
    assert CountedReads.reads == 1
    assert totals.values() == {"loss": 2.0, "other": 1.0}
