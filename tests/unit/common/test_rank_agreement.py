"""Agreement of rewards on an order, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from common.rank_agreement import kendall, rank_agreement
from common.types import FloatArray


def scores(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float32)


RISING = scores(1, 2, 3)


def test_equal_and_opposite_orders() -> None:
    assert kendall(RISING, scores(-5, 0, 100)) == 1
    assert kendall(RISING, scores(3, 2, 1)) == -1


def test_one_of_three_pairs_in_the_opposite_order() -> None:
    assert kendall(RISING, scores(1, 3, 2)) == pytest.approx((2 - 1) / 3)


def test_ties_count_as_in_tau_b() -> None:
    """Two of three pairs are ordered in both: 2 / sqrt(3 * 2)."""
    assert kendall(RISING, scores(1, 1, 2)) == pytest.approx(2 / 6**0.5)


def test_without_an_order_there_is_none() -> None:
    assert kendall(RISING, scores(1, 1, 1)) is None
    assert kendall(scores(1), scores(2)) is None
    assert rank_agreement([]) is None
    assert rank_agreement([(RISING, scores(1, 1, 1))]) is None


def test_pairs_of_rewards_are_averaged() -> None:
    pairs = [(RISING, RISING), (RISING, scores(3, 2, 1)), (RISING, scores(0, 0, 0)), (RISING, scores(2, 3, 4))]
    assert rank_agreement(pairs) == pytest.approx(1 / 3)
