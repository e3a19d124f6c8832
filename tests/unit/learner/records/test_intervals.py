"""Intervals and the best policy: hand-computed values, limits, and what counts as noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learner.records.intervals import LEAST_PROMPTS, difference, interval, t_95, winner
from learner.records.run_files import PolicyResult

SAME = ("abc", "2", "0")


def result(values: list[float], basis: tuple[str, ...] = SAME, name: str = "gold") -> PolicyResult:
    return PolicyResult({name: sum(values) / len(values)}, {name: dict(enumerate(values))}, basis)


def test_an_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))  # the standard deviation is 1
    assert math.isnan(interval([1.0]).half_width)


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (10, 2.228), (30, 2.042), (60, 2.000), (10_000, 1.960)])
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert t_95(degrees) == pytest.approx(expected, rel=2e-3)


def test_policies_on_the_same_noise_are_compared_prompt_by_prompt() -> None:
    base = [0.1, 0.9, 0.3, 0.7, 0.5, 0.2]
    better = [value + 0.01 + 0.001 * (place % 2) for place, value in enumerate(base)]
    policies = {"a": result(base), "b": result(better)}
    assert winner(policies, "gold") == "b"  # the difference is small, and the same for every prompt
    apart = {"a": result(base), "b": result(better, ("other prompts", "2", "0"))}
    assert winner(apart, "gold") == ""  # between different prompts it is noise
    gap = difference(apart["b"], apart["a"], "gold")
    errors = [np.std(values, ddof=1) / math.sqrt(6) for values in (base, better)]
    assert gap.half_width == pytest.approx(2.571 * math.hypot(*errors))


def test_equal_policies_and_few_prompts_have_no_winner() -> None:
    values = [0.1, 0.4, 0.2, 0.8, 0.5]
    assert winner({"a": result(values), "b": result(values)}, "gold") == ""
    few = [1.0] * (LEAST_PROMPTS - 1)
    assert winner({"a": result(few), "b": result([0.0] * len(few))}, "gold") == ""
    many = [1.0] * LEAST_PROMPTS
    assert winner({"a": result(many), "b": result([0.0] * len(many))}, "gold") == "a"


def test_the_winner_must_beat_every_other_policy() -> None:
    policies = {"a": result([0.5] * 8), "b": result([0.9] * 8), "c": result([1.0, 0.75] * 4)}
    assert winner(policies, "gold") == ""  # b and c differ by noise: the interval of their difference includes zero
    del policies["c"]
    assert winner(policies, "gold") == "b"


@pytest.mark.parametrize(
    ("policies", "metric"),
    [
        ({"a": result([1.0] * 8)}, "gold"),
        ({"a": result([1.0] * 8), "b": PolicyResult({"gold": 0.0}, {}, SAME)}, "gold"),
        ({"a": result([1.0] * 8, name="unscored"), "b": result([0.0] * 8, name="unscored")}, "unscored"),
        ({"a": result([1.0] * 8), "b": result([math.nan] * 8)}, "gold"),
    ],
)
def test_no_winner_without_a_known_difference_of_a_quality(policies: dict[str, PolicyResult], metric: str) -> None:
    assert winner(policies, metric) == ""
