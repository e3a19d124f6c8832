"""Outage policies on a failing reward, with a client that returns scripted responses."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from common.errors import (
    RewardError,
    RewardInvalid,
    RewardOutage,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
)
from common.rewards.api import FloatArray, ScoreRequest
from common.rewards.breaker import BreakerState
from common.rewards.client import RewardClient, ScoreQuestion
from common.rewards.control_request import ControlRequest
from common.rewards.guard import Outage, RewardGuard
from common.types import OutagePolicy, RewardHealth
from tests.helpers.fake_reward_server import Time

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
PROMPTS = ["a", "b"]
SERVER = "http://server:1"
CONTROL = ControlRequest("a dot", {"count": 1})


def failing(error: RewardError) -> RewardError:
    """As the client raises it: signed by the server that failed."""
    error.url = SERVER
    return error


DOWN = failing(RewardUnavailable("hps", "refused", "nobody there"))
NAN = failing(RewardInvalid("hps", "nan", "not finite"))
RAISED = failing(RewardUnavailable("hps", "scorer", "out of memory"))
LATE = failing(RewardUnavailable("hps", "deadline", "no answer within 57 s"))
FULL = failing(RewardOverloaded("hps", "overloaded", "queue full", retry_after=4.0))
REJECTED = RewardRejected("hps", "request", "too long")


class Client(RewardClient):
    """`pick` always answers 1; `hps` raises what `failures` holds, in turn, then answers 2."""

    def __init__(self, failures: Sequence[RewardError]) -> None:
        self.failures = list(failures)
        self.asked: list[tuple[str, bool]] = []
        self.controls: list[tuple[str, ControlRequest, str | None]] = []
        self.answers_controls = True
        self.watch: Callable[[], None] = lambda: None

    def seconds_to_probe(self, name: str) -> float:
        return 0.5

    def states(self, name: str) -> dict[str, BreakerState]:
        return {SERVER: BreakerState.OPEN if name == "hps" else BreakerState.CLOSED}

    def score_one(self, name: str, question: ScoreQuestion, *, again: bool = False) -> FloatArray:
        count = len(ScoreRequest.from_bytes(question.body).prompts)
        self.asked.append((name, again))
        if name == "hps":
            self.watch()
        if name == "hps" and self.failures:
            raise self.failures.pop(0)
        return np.full(count, 2 if name == "hps" else 1, np.float32)

    def send_control(
        self, name: str, control: ControlRequest, *, url: str | None = None, gradient: bool = False
    ) -> None:
        self.controls.append((name, control, url))
        if not self.answers_controls:
            raise NAN


def guarded(
    client: Client, policy: OutagePolicy, limit_s: float = 10.0, control: ControlRequest | None = CONTROL
) -> tuple[RewardGuard, Time]:
    time = Time()
    outages = {"hps": Outage(policy, limit_s), "pick": Outage(OutagePolicy.PAUSE, limit_s)}
    known = {} if control is None else {"hps": control, "pick": control}
    return RewardGuard(client, outages, known, time.timing(draw=lambda: 0.0)), time


def test_a_pause_holds_until_the_reward_is_back() -> None:
    client = Client([DOWN] * 5)
    guard, time = guarded(client, OutagePolicy.PAUSE)
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert {name: values.tolist() for name, values in answers.values.items()} == {"hps": [2, 2], "pick": [1, 1]}
    assert (answers.left_out, answers.failure) == ({}, None)
    assert answers.held_s == time.now == 2.5
    # It is one question, however often it is asked.
    assert [again for name, again in client.asked if name == "hps"] == [False, *[True] * 5]


def test_a_pause_is_bounded_and_ends_by_name() -> None:
    guard, time = guarded(Client([DOWN] * 1000), OutagePolicy.PAUSE, limit_s=10.0)
    with pytest.raises(RewardOutage, match=r"reward hps was out for 10 s.*outage_limit_s.*nobody there") as caught:
        guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert (caught.value.reward, caught.value.cause) == ("hps", "refused")
    assert time.now == 10.0


@pytest.mark.parametrize("error", [DOWN, FULL, RewardOutage("hps", "refused", "out for 10 s")])
def test_an_error_survives_the_trip_between_processes(error: RewardError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_a_full_queue_is_given_the_time_it_asks_for() -> None:
    guard, time = guarded(Client([FULL, FULL]), OutagePolicy.PAUSE)
    guard.score(IMAGES, PROMPTS, [], ["hps"])
    assert time.pauses == [4.0, 4.0]


def test_a_dropped_group_names_its_failure_at_once() -> None:
    guard, time = guarded(Client([DOWN]), OutagePolicy.DROP_GROUP)
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert answers.failure is DOWN
    assert time.now == 0


@pytest.mark.parametrize("failure", [DOWN, NAN, RAISED])
def test_renormalise_goes_on_with_the_others(failure: RewardError) -> None:
    guard, _ = guarded(Client([failure]), OutagePolicy.RENORMALISE)
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert list(answers.values) == ["pick"]
    assert answers.left_out == {"hps": failure}
    assert answers.failure is None


def test_with_no_reward_left_the_group_is_dropped() -> None:
    guard, _ = guarded(Client([DOWN]), OutagePolicy.RENORMALISE)
    answers = guard.score(IMAGES, PROMPTS, [], ["hps"])
    assert (answers.values, answers.failure) == ({}, DOWN)


@pytest.mark.parametrize("policy", list(OutagePolicy))
def test_a_rejected_request_is_no_outage(policy: OutagePolicy) -> None:
    guard, time = guarded(Client([REJECTED]), policy)
    assert guard.score(IMAGES, PROMPTS, [], ["hps", "pick"]).failure is REJECTED
    assert time.now == 0


@pytest.mark.parametrize("failure", [NAN, RAISED, LATE])
def test_a_bad_request_pauses_nothing(failure: RewardError) -> None:
    """The server that failed answers the control request, so the request is at fault, even a worker's first."""
    client = Client([failure])
    guard, time = guarded(client, OutagePolicy.PAUSE)
    assert guard.score(IMAGES, PROMPTS, [], ["hps"]).failure is failure
    assert client.controls == [("hps", CONTROL, SERVER)]
    assert time.now == 0


@pytest.mark.parametrize("failure", [NAN, RAISED, LATE])
def test_failing_at_everything_is_an_outage(failure: RewardError) -> None:
    client = Client([failure] * 3)
    client.answers_controls = False
    guard, _ = guarded(client, OutagePolicy.PAUSE)
    answers = guard.score(IMAGES, PROMPTS, [], ["hps"])
    assert answers.values["hps"].tolist() == [2, 2]
    assert answers.held_s > 0


def test_an_unreachable_server_gets_no_control_request() -> None:
    client = Client([DOWN] * 3)
    guarded(client, OutagePolicy.PAUSE)[0].score(IMAGES, PROMPTS, [], ["hps"])
    assert client.controls == []


def test_without_a_control_request_every_failure_is_an_outage() -> None:
    client = Client([NAN])
    guard, _ = guarded(client, OutagePolicy.PAUSE, control=None)
    assert guard.score(IMAGES, PROMPTS, [], ["hps"]).held_s > 0


@pytest.mark.parametrize("policy", [OutagePolicy.DROP_GROUP, OutagePolicy.RENORMALISE])
def test_an_evaluation_always_waits(policy: OutagePolicy) -> None:
    guard, time = guarded(Client([DOWN] * 4), policy)
    assert sorted(guard.score_all(IMAGES, PROMPTS, [])) == ["hps", "pick"]
    assert time.now == 2.0
    with pytest.raises(RewardRejected, match="too long"):
        guarded(Client([REJECTED]), policy)[0].score_all(IMAGES, PROMPTS, [])


def test_an_evaluation_goes_on_without_what_a_reward_fails_at_alone() -> None:
    """The images are the same on every resume: a run that ended here could never get past them."""
    guard, time = guarded(Client([RAISED]), OutagePolicy.PAUSE)
    assert list(guard.score_all(IMAGES, PROMPTS, [])) == ["pick"]
    assert time.now == 0


def test_health_has_the_states_of_all_servers_and_what_is_held_now() -> None:
    """A look at it during the outage, from the clock that the pause reads."""
    client = Client([DOWN] * 2)
    guard, _ = guarded(client, OutagePolicy.PAUSE)
    seen: list[int] = []
    client.watch = lambda: seen.append(guard.health()["hps"].held)
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert seen == [0, 1, 1]
    health = guard.health()
    assert health["hps"] == RewardHealth({"closed": 0, "open": 1, "half_open": 0}, 0)
    assert health["pick"] == RewardHealth({"closed": 1, "open": 0, "half_open": 0}, 0)
    assert answers.seconds == {"hps": answers.held_s, "pick": 0.0}


def test_a_pause_that_ends_the_run_is_not_held_any_more() -> None:
    guard, _ = guarded(Client([DOWN] * 1000), OutagePolicy.PAUSE, limit_s=10.0)
    with pytest.raises(RewardOutage):
        guard.score(IMAGES, PROMPTS, [], ["hps"])
    assert guard.health()["hps"].held == 0
