"""The choice of a number of threads, on a clock that only the passes move."""

from __future__ import annotations

import pytest

from learner.training.thread_probe import BUDGET_S, best_number, timed_passes


class Machine:
    """Seconds of a pass by the number of threads; the first pass with each takes ten times as long."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self._seconds = seconds
        self._threads = 0
        self._warm = False
        self.now = 100.0
        self.used: list[int] = []

    def use(self, threads: int) -> None:
        self._threads, self._warm = threads, False
        self.used.append(threads)

    def one_pass(self) -> None:
        self.now += self._seconds[self._threads] * (1 if self._warm else 10)
        self._warm = True

    def timed(self, cpus: int) -> dict[int, float]:
        return timed_passes(self.one_pass, cpus, self.use, lambda: self.now)


def test_every_power_of_two_up_to_the_cpus_is_timed_within_the_budget() -> None:
    machine = Machine({1: 0.01, 2: 0.006, 4: 0.004, 6: 0.008})
    assert machine.timed(6) == pytest.approx({1: 0.01, 2: 0.006, 4: 0.004, 6: 0.008})
    assert machine.used == [6, 4, 2, 1]
    assert BUDGET_S <= machine.now - 100 <= BUDGET_S + 0.1


@pytest.mark.parametrize(("cpus", "numbers"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (8, [8, 4, 2, 1])])
def test_the_numbers_that_are_tried(cpus: int, numbers: list[int]) -> None:
    machine = Machine(dict.fromkeys(numbers, 0.001))
    machine.timed(cpus)
    assert machine.used == numbers


def test_a_model_whose_pass_exceeds_the_budget_is_timed_once_with_all_cpus() -> None:
    machine = Machine({8: 1.0})
    assert machine.timed(8) == {8: pytest.approx(10.0)}
    assert best_number({8: 10.0}) == 8


@pytest.mark.parametrize(
    ("seconds", "best"),
    [({1: 0.95, 2: 1.2}, 1), ({1: 1.0, 2: 0.95}, 1), ({1: 1.0, 2: 0.9, 4: 0.5, 8: 0.49}, 4), ({1: 1.0, 2: 0.5}, 2)],
)
def test_a_larger_number_must_be_a_tenth_faster(seconds: dict[int, float], best: int) -> None:
    assert best_number(seconds) == best
