"""Requests the groups of an iteration from the workers and collects them, scored, in the order they were asked for.

A group whose score failed is asked for again, then dropped whole and counted by cause; its rewards never become zeros.
The driver sees what a group says about itself (an `Outcome`); the group stays in the object store until the learner
fetches it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import ray
from ray.actor import ActorHandle

from common.errors import RewardInvalid
from common.types import PolicyVersion, Prompt, ScoredGroup, StepPlan
from common.weights import PublishedWeights
from learner.worker_pool import Call, WorkerPool

GROUP_ATTEMPTS = 2
"""Times a group is sampled and scored before it is dropped; each already holds the reward client's own retries."""


class Outcome(Protocol):
    """What a rollout says of itself: see `rollout_workers.actor.RolloutOutcome`."""

    worker: str
    version: PolicyVersion
    seconds: dict[str, float]
    failure: Failure | None


class Failure(Protocol):
    reward: str
    cause: str
    message: str


@dataclass
class Collected:
    """The groups of one iteration.

    Attributes:
        groups: references in the order of the prompts, dropped ones left out.
        seconds: worker seconds by part, summed over groups.
        dropped: cause -> how many groups were dropped for it.
        images: worker -> samples it contributed.
    """

    groups: list[ray.ObjectRef[ScoredGroup]]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    dropped: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Key:
    iteration: int
    place: int
    attempt: int


class Rollouts:
    """Asks for groups ahead of time and waits for those of one iteration."""

    def __init__(self, pool: WorkerPool, group_size: int) -> None:
        self._pool = pool
        self._group_size = group_size
        self._calls: dict[int, list[partial[list[ray.ObjectRef]]]] = {}

    def request(self, plan: StepPlan, prompts: Sequence[Prompt], weights: ray.ObjectRef[PublishedWeights]) -> None:
        """Have one group sampled for every prompt, with these weights."""
        calls = [partial(_start_rollout, prompt, plan, self._group_size, weights) for prompt in prompts]
        self._calls[plan.iteration] = calls
        for place, call in enumerate(calls):
            self._pool.submit(Call(_Key(plan.iteration, place, 1), call))

    def collect(self, iteration: int) -> Collected:
        """Wait for every group of a requested iteration.

        Raises:
            RewardInvalid: not one group could be scored.
            WorkerError: see `WorkerPool.take`.
        """
        collected = Collected([])
        for outcome, group in self._finish(iteration):
            for part, seconds in outcome.seconds.items():
                collected.seconds[part] += seconds
            if outcome.failure is None:
                collected.groups.append(group)
                collected.images[outcome.worker] += self._group_size
            else:
                collected.dropped[f"{outcome.failure.reward}:{outcome.failure.cause}"] += 1
                last_failure = outcome.failure
        if not collected.groups:
            raise RewardInvalid(
                last_failure.reward,
                last_failure.cause,
                f"no group of iteration {iteration} could be scored; the last failure: {last_failure.message}",
            )
        return collected

    def _finish(self, iteration: int) -> list[tuple[Outcome, ray.ObjectRef[ScoredGroup]]]:
        """Every group's last attempt, in the order of the prompts."""
        calls = self._calls.pop(iteration)
        pending = {_Key(iteration, place, 1) for place in range(len(calls))}
        finished: dict[int, tuple[Outcome, ray.ObjectRef[ScoredGroup]]] = {}
        while pending:
            done = self._pool.take(pending)
            key, outcome = done.key, done.result
            pending.remove(key)
            if outcome.failure is not None and key.attempt < GROUP_ATTEMPTS:
                again = _Key(iteration, key.place, key.attempt + 1)
                self._pool.submit(Call(again, calls[key.place]))
                pending.add(again)
            else:
                finished[key.place] = (outcome, done.references[1])
        return [finished[place] for place in sorted(finished)]


def _start_rollout(
    prompt: Prompt,
    plan: StepPlan,
    group_size: int,
    weights: ray.ObjectRef[PublishedWeights],
    worker: ActorHandle,
) -> list[ray.ObjectRef]:
    return worker.rollout.options(num_returns=2).remote(prompt, plan, group_size, weights)
