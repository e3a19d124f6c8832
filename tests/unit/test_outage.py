"""What each outage policy does with a reward that fails, on a client that answers as it is told."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from common.errors import RewardError, RewardInvalid, RewardOutage, RewardRejected, RewardUnavailable
from common.outage import Outage, OutagePolicy, RewardGuard
from common.retry_budget import Timing
from common.reward_api import FloatArray, ScoreRequest
from common.reward_client import RewardClient, ScoreQuestion

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
PROMPTS = ["a", "b"]
DOWN = RewardUnavailable("hps", "refused", "nobody there")
NAN = RewardInvalid("hps", "nan", "not finite")
REJECTED = RewardRejected("hps", "request", "too long")


class Client(RewardClient):
    """`pick` always answers 1; `hps` raises what `failures` holds, in turn, then answers 2."""

    def __init__(self, failures: Sequence[RewardError]) -> None:
        self.failures = list(failures)
        self.asked: list[tuple[str, int]] = []
        self.well_for_one_image = True

    def seconds_to_probe(self, name: str) -> float:
        return 0.5

    def score_one(self, name: str, question: ScoreQuestion, *, use_cache: bool = True) -> FloatArray:
        count = len(ScoreRequest.from_bytes(question.body).prompts)
        self.asked.append((name, count))
        if not use_cache:
            if not self.well_for_one_image:
                raise NAN
            return np.ones(1, np.float32)
        if name == "hps" and self.failures:
            raise self.failures.pop(0)
        return np.full(count, 2 if name == "hps" else 1, np.float32)


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def guarded(client: Client, policy: OutagePolicy, limit_s: float = 10.0) -> tuple[RewardGuard, Time]:
    time = Time()
    timing = Timing(clock=lambda: time.now, sleep=time.sleep, draw=lambda: 0.0)
    outages = {"hps": Outage(policy, limit_s), "pick": Outage("pause", limit_s)}
    return RewardGuard(client, outages, timing), time


def test_a_pause_holds_until_the_reward_is_back() -> None:
    guard, time = guarded(Client([DOWN] * 5), "pause")
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert {name: values.tolist() for name, values in answers.values.items()} == {"hps": [2, 2], "pick": [1, 1]}
    assert (answers.left_out, answers.failure) == ({}, None)
    assert answers.held_s == time.now == 2.5


def test_a_pause_is_bounded_and_ends_by_name() -> None:
    guard, time = guarded(Client([DOWN] * 1000), "pause", limit_s=10.0)
    with pytest.raises(RewardOutage, match=r"reward hps was out for 10 s.*outage_limit_s.*nobody there") as caught:
        guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert (caught.value.reward, caught.value.cause) == ("hps", "refused")
    assert time.now == 10.0
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.reward, copy.cause) == (RewardOutage, "hps", "refused")


def test_a_dropped_group_names_its_failure_at_once() -> None:
    guard, time = guarded(Client([DOWN]), "drop_group")
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert answers.failure is DOWN
    assert time.now == 0


@pytest.mark.parametrize("failure", [DOWN, NAN])
def test_renormalise_goes_on_with_the_others(failure: RewardError) -> None:
    guard, _ = guarded(Client([failure]), "renormalise")
    answers = guard.score(IMAGES, PROMPTS, [], ["hps", "pick"])
    assert list(answers.values) == ["pick"]
    assert answers.left_out == {"hps": failure}
    assert answers.failure is None


def test_with_no_reward_left_the_group_is_dropped() -> None:
    guard, _ = guarded(Client([DOWN]), "renormalise")
    answers = guard.score(IMAGES, PROMPTS, [], ["hps"])
    assert (answers.values, answers.failure) == ({}, DOWN)


@pytest.mark.parametrize("policy", ["pause", "drop_group", "renormalise"])
def test_a_rejected_request_is_no_outage(policy: OutagePolicy) -> None:
    guard, time = guarded(Client([REJECTED]), policy)
    assert guard.score(IMAGES, PROMPTS, [], ["hps", "pick"]).failure is REJECTED
    assert time.now == 0


def test_a_wrong_answer_to_one_question_alone_pauses_nothing() -> None:
    """It is asked again for an image it has scored before: it answers, so the group itself is at fault."""
    client = Client([])
    guard, time = guarded(client, "pause")
    guard.score(IMAGES, PROMPTS, [], ["hps"])
    client.failures = [NAN]
    assert guard.score(IMAGES, PROMPTS, [], ["hps"]).failure is NAN
    assert client.asked[-1] == ("hps", 1)
    assert time.now == 0


def test_wrong_answers_to_everything_are_an_outage() -> None:
    client = Client([])
    guard, _ = guarded(client, "pause")
    guard.score(IMAGES, PROMPTS, [], ["hps"])
    client.failures, client.well_for_one_image = [NAN] * 3, False
    assert guard.score(IMAGES, PROMPTS, [], ["hps"]).values["hps"].tolist() == [2, 2]


@pytest.mark.parametrize("policy", ["drop_group", "renormalise"])
def test_an_evaluation_always_waits(policy: OutagePolicy) -> None:
    guard, time = guarded(Client([DOWN] * 4), policy)
    assert sorted(guard.score_all(IMAGES, PROMPTS, [])) == ["hps", "pick"]
    assert time.now == 2.0
    with pytest.raises(RewardRejected, match="too long"):
        guarded(Client([REJECTED]), policy)[0].score_all(IMAGES, PROMPTS, [])
