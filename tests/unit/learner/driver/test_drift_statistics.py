"""Tests of drift: hand-computed values, tables of Student's t, and the rate of false alarms by simulation."""

from __future__ import annotations

import random

import pytest

from learner.driver.drift_statistics import Estimate, chance_of_fall, chance_of_rise, paired_change, student_tail


def test_the_mean_of_values() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.freedom) == (3.0, 3)
    assert found.error == pytest.approx((14 / 3 / 4) ** 0.5)


def test_means_are_joined_with_equal_weights() -> None:
    found = Estimate.joined([Estimate(1.0, 0.3, 5), Estimate(2.0, 0.4, 5)])
    assert found.mean == 1.5
    assert found.error == pytest.approx(0.25)
    assert found.freedom == pytest.approx(0.25**2 / (0.3**4 + 0.4**4) * 5)


def test_the_difference_of_two_means() -> None:
    found = Estimate(5.0, 0.3, 9).minus(Estimate(1.0, 0.4, 9))
    assert (found.mean, found.error) == (4.0, pytest.approx(0.5))
    assert Estimate(1.0, 0.0, 4).minus(Estimate(0.0, 0.0, 9)).freedom == 4


def test_pairs_that_miss_a_value_are_left_out() -> None:
    assert paired_change([1.0, None, 3.0, 4.0], [0.0, 5.0, None, 1.0]) == Estimate.of([1.0, 3.0])
    assert paired_change([1.0, 3.0], [1.0, 2.0], kept=0.5) == Estimate.of([0.5, 2.0])
    assert paired_change([1.0, None], [0.0, 1.0]) is None


@pytest.mark.parametrize(
    ("t", "freedom", "chance", "within"),
    [(2.015, 5, 0.05, 0.01), (2.764, 10, 0.01, 0.02), (3.646, 30, 5e-4, 0.02), (1.645, 1e6, 0.05, 0.001)],
)
def test_the_tail_agrees_with_tables(t: float, freedom: float, chance: float, within: float) -> None:
    assert student_tail(t, freedom) == pytest.approx(chance, rel=within)
    assert student_tail(-t, freedom) == pytest.approx(1 - chance, rel=within)


def test_a_tolerance_moves_the_limit() -> None:
    change = Estimate(1.0, 0.1, 30)
    assert chance_of_rise(change) < 1e-9
    assert chance_of_rise(change, 1.0) == 0.5
    assert chance_of_rise(change, 2.0) > 0.999
    assert chance_of_fall(change) > 0.999
    assert chance_of_fall(Estimate(-1.0, 0.1, 30), 0.5) == pytest.approx(chance_of_rise(change, 0.5))


def test_without_spread_the_answer_is_certain() -> None:
    assert chance_of_rise(Estimate(0.5, 0.0, 3), 0.1) == 0
    assert chance_of_rise(Estimate(0.1, 0.0, 3), 0.1) == 1


def test_false_alarms_are_as_frequent_as_stated() -> None:
    """4 000 comparisons of equal policies over 16 prompts, at a level of 5 %: 200 expected, standard deviation 14."""
    draw = random.Random(0)
    raised = 0
    for _ in range(4000):
        start, now = ([draw.gauss(0, 1) for _ in range(16)] for _ in range(2))
        change = paired_change(now, start)
        assert change is not None
        raised += chance_of_fall(change) < 0.05
    assert 145 < raised < 255
