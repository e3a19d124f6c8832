"""Collecting groups: order, retries, drops; on a pool that answers as it is told."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.errors import AttestationError, RewardInvalid, RewardOutage
from common.group_ends import DueGroup, GroupEnd, GroupFault, GroupOutcome, RefusedGroup
from common.kept_groups import GroupPicture
from common.types import PolicyVersion, Prompt, RolloutOutcome, ScoringFailure, StepPlan
from learner.driver.call_queue import Call
from learner.driver.publisher import Publication
from learner.driver.rollouts import GROUP_ATTEMPTS, Attest, Pictured, Rollouts
from learner.driver.worker_pool import Finished
from learner.records.prometheus import RunMetrics

PROMPTS = [Prompt(index, f"prompt {index}") for index in (4, 2, 9)]
TIMEOUT = ScoringFailure("hps", "timeout", "no answer within 1 s")


class FakeMethod:
    """Stands for `worker.rollout`: records what it is called with, and returns its references."""

    def __init__(self) -> None:
        self.pictured: dict[tuple[int, int], bool] = {}

    def options(self, **_: object) -> FakeMethod:
        return self

    def remote(
        self, prompt: Prompt, plan: StepPlan, group_size: int, weights: object, frozen: object, *, pictured: bool
    ) -> list[object]:
        assert frozen == "frozen"
        self.pictured[plan.iteration, prompt.index] = pictured
        return [("outcome", prompt.index), f"group of {prompt.index} at {plan.iteration} with {weights}"]


class FakeWorker:
    rollout = FakeMethod()
    """All workers share it."""


@dataclass
class FakePool:
    """Finishes calls newest first; `fails(iteration, prompt index, attempt)` says which groups go unscored."""

    fails: Callable[[int, int, int], bool] = lambda *_: False
    failure: ScoringFailure = TIMEOUT
    left_out: tuple[ScoringFailure, ...] = ()
    spreads: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting: list[Call] = []
        self.taken: list[Hashable] = []

    def submit(self, call: Call) -> None:
        self.waiting.append(call)

    def take(self, keys: Container[Hashable]) -> Finished:
        place = max(place for place, call in enumerate(self.waiting) if call.key in keys)
        call = self.waiting.pop(place)
        self.taken.append(call.key)
        references = call.submit(FakeWorker())
        key: Any = call.key
        failed = self.fails(key.iteration, references[0][1], key.attempt)
        seconds = {"rollout": 1.0, "score": 0.5}
        failure = self.failure if failed else None
        picture = None
        if FakeWorker.rollout.pictured[key.iteration, references[0][1]] and not failed:
            picture = GroupPicture(f"prompt {references[0][1]}", b"", ".png", {})
        outcome = RolloutOutcome(
            "here:1",
            PolicyVersion(0, "x"),
            seconds,
            failure,
            self.left_out,
            digest="seal",
            picture=picture,
            reward_spreads=self.spreads,
        )
        return Finished(call.key, outcome, references)


def plan(iteration: int) -> StepPlan:
    return StepPlan(iteration, (1.0, 0.5, 0.0), 0.9, (0,))


def rollouts(
    pool: FakePool,
    *iterations: int,
    attest: Attest = lambda *_: None,
    outage_limit_s: float = 0.0,
    clock: Callable[[], float] = lambda: 0.0,
) -> Rollouts:
    rollouts = Rollouts(pool, 4, attest, outage_limit_s, clock)
    for iteration in iterations:
        rollouts.request(plan(iteration), PROMPTS, Publication(f"v{iteration}", "frozen"))
    return rollouts


def test_groups_come_in_the_order_of_their_prompts() -> None:
    collected = rollouts(FakePool(), 3).collect(3)
    assert collected.groups == [f"group of {index} at 3 with v3" for index in (4, 2, 9)]
    assert collected.images == {"here:1": 12}
    assert collected.seconds == {"rollout": 3.0, "score": 1.5}
    assert not collected.dropped


def test_the_first_groups_of_some_iterations_are_pictured() -> None:
    pool = FakePool(lambda _, index, __: index == 4)
    asked = Rollouts(pool, 4, lambda *_: None, pictured=Pictured(groups=2, every=5))
    for iteration in (4, 5):
        asked.request(plan(iteration), PROMPTS, Publication("v", "frozen"))
    assert asked.collect(4).pictures == {}
    # The first group is dropped, so the second one is at place 0 of what is trained on.
    assert {place: one.prompt for place, one in asked.collect(5).pictures.items()} == {0: "prompt 2"}


def test_a_failed_group_is_asked_for_again() -> None:
    pool = FakePool(lambda _, index, attempt: index == 2 and attempt < GROUP_ATTEMPTS)
    collected = rollouts(pool, 0).collect(0)
    assert collected.groups == [f"group of {index} at 0 with v0" for index in (4, 2, 9)]
    assert not collected.dropped
    assert len(pool.taken) == 4


def test_a_group_that_keeps_failing_is_dropped_whole_and_counted_by_cause() -> None:
    pool = FakePool(lambda _, index, __: index in (4, 9))
    collected = rollouts(pool, 0).collect(0)
    assert collected.groups == ["group of 2 at 0 with v0"]
    assert collected.images == {"here:1": 4}
    assert collected.dropped == {"hps:timeout": 2}
    assert collected.reasons == {"hps:timeout": "no answer within 1 s"}
    assert len(pool.taken) == 1 + 2 * GROUP_ATTEMPTS


def test_when_every_group_failed_the_reward_is_named() -> None:
    with pytest.raises(RewardInvalid, match=r"no group of iteration 5 could be scored.*no answer within 1 s") as caught:
        rollouts(FakePool(lambda *_: True), 5).collect(5)
    assert (caught.value.reward, caught.value.cause) == ("hps", "timeout")


def test_iterations_requested_ahead_do_not_mix() -> None:
    """Iteration 1's calls finish first, and one of them fails: both belong to iteration 1 alone."""
    pool = FakePool(lambda iteration, index, attempt: (iteration, index, attempt) == (1, 9, 1))
    ahead = rollouts(pool, 0, 1)
    assert ahead.collect(0).groups == [f"group of {index} at 0 with v0" for index in (4, 2, 9)]
    collected = ahead.collect(1)
    assert collected.groups == [f"group of {index} at 1 with v1" for index in (4, 2, 9)]
    assert collected.images == {"here:1": 12}


def test_an_iteration_lost_whole_is_sampled_again_until_the_reward_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.driver.rollouts.EMPTY_ITERATION_PAUSE_S", 0.0)
    pool = FakePool(lambda _, index, attempt: attempt <= 2 * GROUP_ATTEMPTS or index == 9)
    collected = rollouts(pool, 0, outage_limit_s=600.0).collect(0)
    assert collected.groups == ["group of 4 at 0 with v0", "group of 2 at 0 with v0"]
    # Two samplings of three groups came to nothing, the third to all but one.
    assert collected.dropped == {"hps:timeout": 7}
    assert collected.seconds == {"rollout": 9.0, "score": 4.5}
    assert collected.images == {"here:1": 8}


def test_an_outage_is_timed_from_the_first_sampling_that_came_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the request: sampling itself may take longer than an outage may."""
    now = [0.0]
    monkeypatch.setattr("learner.driver.rollouts.time.sleep", lambda seconds: None)

    def fails(*_: int) -> bool:
        now[0] += 10.0
        return True

    pool = FakePool(fails)
    expected = r"for 60 s, and the longest rewards\.\*\.outage_limit_s is 50 s; bring the reward hps back"
    with pytest.raises(RewardOutage, match=expected) as caught:
        rollouts(pool, 0, outage_limit_s=50.0, clock=lambda: now[0]).collect(0)
    assert caught.value.cause == "timeout"
    assert len(pool.taken) == 2 * len(PROMPTS) * GROUP_ATTEMPTS


def test_a_request_that_is_itself_wrong_is_not_waited_for() -> None:
    pool = FakePool(lambda *_: True, ScoringFailure("hps", "request", "too long"))
    with pytest.raises(RewardInvalid, match="too long"):
        rollouts(pool, 0, outage_limit_s=600.0).collect(0)


def test_groups_trained_without_a_reward_are_counted_by_cause() -> None:
    collected = rollouts(FakePool(left_out=(TIMEOUT,)), 0).collect(0)
    assert len(collected.groups) == 3
    assert collected.renormalised == {"hps:timeout": 3}
    assert not collected.dropped


def refusing(*faults: tuple[int, GroupFault]) -> tuple[Attest, list[DueGroup]]:
    """An attestation that finds these faults, each once, in groups of prompts with these indices."""
    left, asked = list(faults), []

    def attest(_: object, due: DueGroup) -> GroupFault | None:
        asked.append(due)
        found = next((fault for fault in left if fault[0] == due.prompt.index), None)
        if found is None:
            return None
        left.remove(found)
        return found[1]

    return attest, asked


def ends(iteration: int, **changed: GroupEnd) -> list[GroupEnd]:
    """The ends of an iteration's groups, all trained at once but these."""
    whole = {f"p{i}": GroupEnd(iteration, i, GroupOutcome.TRAINED, "here:1", 1) for i in (4, 2, 9)}
    return list((whole | changed).values())


def test_a_refused_group_is_sampled_again_and_the_worker_counted() -> None:
    """Each is checked against what was asked for and what its worker reported."""
    attest, asked = refusing((2, GroupFault.DAMAGED))
    pool = FakePool()
    collected = rollouts(pool, 3, attest=attest).collect(3)
    assert collected.groups == [f"group of {index} at 3 with v3" for index in (4, 2, 9)]
    assert collected.refused == [RefusedGroup("here:1", GroupFault.DAMAGED)]
    assert not collected.dropped
    assert (len(pool.taken), len(asked)) == (4, 4)
    assert asked[0] == DueGroup(PROMPTS[2], plan(3), 4, "seal")
    assert collected.ends == ends(3, p2=GroupEnd(3, 2, GroupOutcome.TRAINED, "here:1", 2))


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [(GroupFault.LOST, GroupOutcome.INFRA_DROPPED), (GroupFault.STALE, GroupOutcome.STALE)],
)
def test_a_group_that_is_refused_twice_is_dropped_by_cause(fault: GroupFault, outcome: GroupOutcome) -> None:
    attest, _ = refusing(*[(9, fault)] * GROUP_ATTEMPTS)
    collected = rollouts(FakePool(), 0, attest=attest).collect(0)
    assert collected.groups == [f"group of {index} at 0 with v0" for index in (4, 2)]
    assert collected.dropped == {f"infra:{fault}": 1}
    assert collected.reasons == {f"infra:{fault}": "the learner refused what here:1 sampled"}
    assert collected.ends == ends(0, p9=GroupEnd(0, 9, outcome, "here:1", 2, f"infra:{fault}"))


def test_a_group_without_a_score_is_not_checked_and_ends_as_reward_failed() -> None:
    attest, asked = refusing()
    collected = rollouts(FakePool(lambda _, index, __: index == 4), 0, attest=attest).collect(0)
    assert {due.prompt.index for due in asked} == {2, 9}
    assert collected.ends == ends(0, p4=GroupEnd(0, 4, GroupOutcome.REWARD_FAILED, "here:1", 2, "hps:timeout"))


def test_the_ends_are_those_of_the_last_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage left the iteration without any group at first: each group has one end, not one per sampling."""
    monkeypatch.setattr("learner.driver.rollouts.EMPTY_ITERATION_PAUSE_S", 0.0)
    pool = FakePool(lambda _, __, attempt: attempt <= GROUP_ATTEMPTS)
    collected = rollouts(pool, 0, outage_limit_s=600.0).collect(0)
    again = {f"p{i}": GroupEnd(0, i, GroupOutcome.TRAINED, "here:1", GROUP_ATTEMPTS + 1) for i in (4, 2, 9)}
    assert collected.ends == ends(0, **again)


def test_an_iteration_of_which_nothing_arrives_whole_ends_the_run_by_name() -> None:
    attest, _ = refusing(*[(prompt.index, GroupFault.DAMAGED) for prompt in PROMPTS] * GROUP_ATTEMPTS)
    with pytest.raises(AttestationError, match=r"no group of iteration 7 .* of worker here:1, was damaged: .*--resume"):
        rollouts(FakePool(), 7, attest=attest).collect(7)


def test_groups_are_counted_as_they_finish_and_spreads_are_kept() -> None:
    metrics = RunMetrics(CollectorRegistry(), "test")
    pool = FakePool(lambda _, index, attempt: index == 2 or (index == 9 and attempt == 1))
    pool.spreads = {"hps": 0.5}
    attest, _ = refusing((4, GroupFault.LOST), (4, GroupFault.LOST))
    asked = Rollouts(pool, 4, attest, metrics=metrics)
    asked.request(plan(3), PROMPTS, Publication("v3", "frozen"))
    collected = asked.collect(3)

    def count(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"rtdmd_{name}_total", {"run": "test", **labels})

    outcomes = ("scored", "retried", "dropped")
    assert [count("groups", outcome=outcome) for outcome in outcomes] == [1, 3, 2]
    assert count("refused_groups", cause="lost") == 2
    assert count("dropped_groups", reward="infra", cause="lost") == 1
    assert collected.spreads == {"hps": [0.5]}
