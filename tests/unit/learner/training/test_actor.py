"""The learner leads its ranks: it merges their results and finds the rank that caused a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from common.errors import RankError, RewardUnavailable
from learner.training.actor import Learner, _all_ranks

GONE = RankError("a rank of the learner is gone")
CAUSE = RewardUnavailable("hps", "http://127.0.0.1:1", "out")


@pytest.fixture(autouse=True)
def remote_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference is the result itself, or the error that the call raised."""

    def get(reference: Any) -> Any:
        if isinstance(reference, list):
            return [get(one) for one in reference]
        if isinstance(reference, Exception):
            raise reference
        return reference

    monkeypatch.setattr(ray, "get", get)


def test_results_are_in_the_order_of_the_ranks() -> None:
    assert _all_ranks(lambda: 7, [8, 9]) == [7, 8, 9]
    assert _all_ranks(lambda: 7, []) == [7]


def fails(error: Exception) -> int:
    raise error


@pytest.mark.parametrize("others", [[CAUSE], [GONE, CAUSE], [RayActorError(), CAUSE], [8, CAUSE]])
def test_if_another_rank_caused_the_failure_its_error_is_raised(others: list[Any]) -> None:
    with pytest.raises(RewardUnavailable) as caught:
        _all_ranks(lambda: fails(GONE), others)
    assert caught.value is CAUSE


@pytest.mark.parametrize("others", [[], [GONE], [RayActorError()], [8]])
def test_without_a_cause_the_lost_rank_is_named(others: list[Any]) -> None:
    with pytest.raises(RankError) as caught:
        _all_ranks(lambda: fails(GONE), others)
    assert caught.value is GONE


def test_an_error_of_rank_0_itself_does_not_wait_for_the_others() -> None:
    with pytest.raises(RewardUnavailable) as caught:
        _all_ranks(lambda: fails(CAUSE), [RayActorError()])
    assert caught.value is CAUSE


def test_an_error_of_another_rank_alone_is_raised() -> None:
    with pytest.raises(RewardUnavailable):
        _all_ranks(lambda: 7, [CAUSE])


class TimedRank:
    """A rank with these timings; as another rank's handle, its methods are called by `.remote`."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self._seconds = seconds
        self.used: list[int] = []

    def time_threads(self) -> dict[int, float]:
        return self._seconds

    def use_threads(self, number: int) -> None:
        self.used.append(number)


class Handle:
    def __init__(self, rank: TimedRank) -> None:
        self.time_threads, self.use_threads = Remote(rank.time_threads), Remote(rank.use_threads)


class Remote:
    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


def test_every_rank_uses_the_threads_that_are_fastest_on_rank_0() -> None:
    own, other = TimedRank({1: 0.4, 2: 0.2}), TimedRank({1: 0.1, 2: 0.2})
    learner = Learner.__new__(Learner)
    learner._own, learner._others = own, [Handle(other)]
    assert learner.choose_threads() == (2, {1: 0.4, 2: 0.2})
    assert own.used == other.used == [2]
