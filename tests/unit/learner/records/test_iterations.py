"""Time left, and trends that noise alone does not make."""

from __future__ import annotations

import random

import pytest

from learner.records.iterations import Iterations, Trend


def test_the_time_left_is_that_of_the_stage() -> None:
    iterations = Iterations({"cold_start": 100, "alignment": 10})
    assert iterations.left_s() is None
    iterations.finished({"seconds/step": 3.0}, "cold_start", 39, now=0.0)
    assert (str(iterations), iterations.left_s()) == ("cold_start 40/100", 60 * 3.0)
    iterations.finished({"seconds/step": 3.0}, "cold_start", 40, now=5.0)  # 2 s between them: a checkpoint
    assert iterations.left_s() == 59 * 5.0
    iterations.finished({"seconds/step": 7.0}, "alignment", 8, now=100.0)
    assert (str(iterations), iterations.left_s()) == ("alignment 9/10", 7.0)
    iterations.finished({"seconds/step": 7.0}, "alignment", 9, now=107.0)
    assert iterations.left_s() == 0.0


def test_a_stage_of_unknown_length() -> None:
    iterations = Iterations({})
    iterations.finished({"seconds/step": 3.0}, "alignment", 6, now=0.0)
    assert (str(iterations), iterations.left_s()) == ("alignment 7", None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0] * 5, Trend.UNKNOWN),
        ([1.0] * 6, Trend.FLAT),
        ([1, 1.1, 0.9, 2, 2.1, 1.9], Trend.UP),
        ([2, 2.1, 1.9, 1, 1.1, 0.9], Trend.DOWN),
        ([1, 3, 2, 2, 3, 1.5], Trend.FLAT),
        ([float("nan"), 1.0, 1.0], Trend.UNKNOWN),
        ([*[9.0] * 30, *[1.0] * 10, *[2.0] * 10], Trend.UP),  # only the last 20 count
    ],
)
def test_a_trend_is_more_than_noise(values: list[float], expected: Trend) -> None:
    iterations = Iterations({})
    for value in values:
        iterations.seen("reward/hps", value)
    assert iterations.trend("reward/hps") is expected


def test_noise_seldom_makes_a_trend() -> None:
    draw, trends = random.Random(0), []
    for _ in range(500):
        iterations = Iterations({})
        for _ in range(20):
            iterations.seen("a", draw.gauss(0, 1))
        trends.append(iterations.trend("a"))
    assert 0.9 < trends.count(Trend.FLAT) / 500 < 0.98
