"""The faults of a run and their moments."""

from __future__ import annotations

from collections import Counter

import pytest

from learner.chaos.schedule import LATEST, MOST, POSSIBLE, Fault, Target, schedule


def test_a_seed_always_gives_the_same_faults_and_another_one_others() -> None:
    assert schedule(3, 8, 34) == schedule(3, 8, 34)
    assert schedule(3, 8, 34) != schedule(4, 8, 34)


@pytest.mark.parametrize("seed", range(20))
def test_faults_are_possible_few_enough_and_early_enough(seed: int) -> None:
    found = schedule(seed, 12, 34)
    assert len(found) == 12
    assert all(one.fault in POSSIBLE[one.target] for one in found)
    assert [one.after for one in found] == sorted(one.after for one in found)
    assert all(1 <= one.after <= 1 + LATEST * 34 for one in found)
    times = Counter(one.target for one in found)
    assert all(times[target] <= most for target, most in MOST.items())
    assert all(0 <= one.pick < 1 for one in found)


def test_every_fault_of_the_table_comes_up() -> None:
    drawn = {(one.target, one.fault) for seed in range(60) for one in schedule(seed, 8, 34)}
    assert drawn == {(target, fault) for target, faults in POSSIBLE.items() for fault in faults}
    assert (Target.DRIVER, Fault.FREEZE) not in drawn
