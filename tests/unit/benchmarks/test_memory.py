"""The figures of benchmarks.memory, from samples by hand."""

from __future__ import annotations

import pytest

from benchmarks.memory import found, slope


def test_growth_is_that_of_the_iterations_after_the_start() -> None:
    samples = [
        {"iteration": float(i), "driver": 100.0 + (50 if i < 20 else 0) + i / 10, "learner": 7.0} for i in range(1, 101)
    ]
    figures = found([*samples, {"iteration": 100.0, "driver": 500.0}], 100)  # the last one saw the run end
    assert figures["mib_per_100_iterations"] == {"driver": 10.0, "learner": 0.0}
    curve = figures["mib"]
    assert isinstance(curve, list)
    assert curve[0] == {"iteration": 1.0, "driver": 150.1, "learner": 7.0}
    assert curve[-1] == {"iteration": 100.0, "driver": 110.0, "learner": 7.0}


def test_slope_is_that_of_least_squares() -> None:
    assert slope([(0.0, 1.0), (1.0, 2.0), (2.0, 6.0)]) == pytest.approx(2.5)
