"""Requests the groups of an iteration from the workers and collects them, scored, in the order of the requests.

A group whose score failed is requested again, then dropped whole and counted by cause; its rewards never become zeros.
An iteration that an outage leaves without any group is sampled again until the rewards recover, for a bounded time.
The driver sees a group's `RolloutOutcome`. The group itself stays in the object store until the learner fetches it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import ray
from ray.actor import ActorHandle

from common.errors import RewardInvalid, RewardOutage
from common.rewards.api import REQUEST_CAUSES
from common.types import Collected, Prompt, RolloutOutcome, ScoredGroup, ScoringFailure, StepPlan
from learner.driver.call_queue import Call
from learner.driver.publisher import Publication
from learner.driver.worker_pool import WorkerPool

GROUP_ATTEMPTS = 2
"""A group is sampled and scored this many times before it is dropped; each time includes the client's own retries."""
EMPTY_ITERATION_PAUSE_S = 1.0
"""Pause before sampling an iteration again of which no group could be scored."""


@dataclass(frozen=True)
class _Key:
    iteration: int
    place: int
    attempt: int


class Rollouts:
    """Requests groups ahead of time and waits for those of one iteration."""

    def __init__(
        self,
        pool: WorkerPool,
        group_size: int,
        outage_limit_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`outage_limit_s`: seconds to keep sampling an iteration that an outage left without any group."""
        self._clock = clock
        self._pool = pool
        self._group_size = group_size
        self._outage_limit_s = outage_limit_s
        self._calls: dict[int, list[partial[list[ray.ObjectRef]]]] = {}

    def check(self) -> None:
        """Raise what has ended the workers, or the servers that they need."""
        self._pool.check()

    def request(self, plan: StepPlan, prompts: Sequence[Prompt], weights: Publication) -> None:
        """Request one group per prompt, sampled with these weights."""
        calls = [partial(_start_rollout, prompt, plan, self._group_size, weights) for prompt in prompts]
        self._calls[plan.iteration] = calls
        for place, call in enumerate(calls):
            self._pool.submit(Call(_Key(plan.iteration, place, 1), call))

    def collect(self, iteration: int) -> Collected:
        """Wait for every group of a requested iteration.

        Raises:
            RewardOutage: no group could be scored for as long as an outage may last.
            RewardInvalid: no group could be scored, and waiting would not help.
            WorkerError: see `WorkerPool.take`.
        """
        calls, collected = self._calls.pop(iteration), Collected([])
        first_attempt = 1
        out_since: float | None = None
        while True:
            failure = self._gather(self._finish(iteration, calls, first_attempt), collected)
            if failure is None or collected.groups:
                return collected
            now = self._clock()
            out_since = now if out_since is None else out_since
            self._require_hope(iteration, failure, now - out_since)
            time.sleep(EMPTY_ITERATION_PAUSE_S)
            first_attempt += GROUP_ATTEMPTS
            for place, call in enumerate(calls):
                self._pool.submit(Call(_Key(iteration, place, first_attempt), call))

    def _require_hope(self, iteration: int, failure: ScoringFailure, out_s: float) -> None:
        """RewardError unless an iteration without any group should be sampled again."""
        lost = f"no group of iteration {iteration} could be scored"
        last = f"the last failure: {failure.message}"
        if failure.cause in REQUEST_CAUSES or self._outage_limit_s == 0:
            raise RewardInvalid(failure.reward, failure.cause, f"{lost}; {last}")
        if out_s >= self._outage_limit_s:
            message = (
                f"{lost} for {out_s:.0f} s, and the longest rewards.*.outage_limit_s is {self._outage_limit_s:g} s; "
                f"bring the reward {failure.reward} back and --resume; {last}"
            )
            raise RewardOutage(failure.reward, failure.cause, message)

    def _gather(
        self, finished: Sequence[tuple[RolloutOutcome, ray.ObjectRef[ScoredGroup]]], collected: Collected
    ) -> ScoringFailure | None:
        """Add the outcomes of an iteration's groups to `collected`; return the last failure among them."""
        failure = None
        for outcome, group in finished:
            for part, seconds in outcome.seconds.items():
                collected.seconds[part] += seconds
            collected.model_s[outcome.worker] += outcome.model_s
            collected.idle_s[outcome.worker] += outcome.seconds.get("idle", 0.0)
            if outcome.failure is None:
                collected.groups.append(group)
                collected.images[outcome.worker] += self._group_size
                collected.renormalised.update(_cause(left_out) for left_out in outcome.left_out)
            else:
                collected.dropped[_cause(outcome.failure)] += 1
                collected.reasons[_cause(outcome.failure)] = outcome.failure.message
                failure = outcome.failure
        return failure

    def _finish(
        self, iteration: int, calls: Sequence[partial[list[ray.ObjectRef]]], first_attempt: int
    ) -> list[tuple[RolloutOutcome, ray.ObjectRef[ScoredGroup]]]:
        """Each group's last attempt, in the order of the prompts."""
        pending = {_Key(iteration, place, first_attempt) for place in range(len(calls))}
        finished: dict[int, tuple[RolloutOutcome, ray.ObjectRef[ScoredGroup]]] = {}
        while pending:
            done = self._pool.take(pending)
            key, outcome = done.key, done.result
            pending.remove(key)
            if outcome.failure is not None and key.attempt - first_attempt + 1 < GROUP_ATTEMPTS:
                again = _Key(iteration, key.place, key.attempt + 1)
                self._pool.submit(Call(again, calls[key.place]))
                pending.add(again)
            else:
                finished[key.place] = (outcome, done.references[1])
        return [finished[place] for place in sorted(finished)]


def _cause(failure: ScoringFailure) -> str:
    return f"{failure.reward}:{failure.cause}"


def _start_rollout(
    prompt: Prompt, plan: StepPlan, group_size: int, weights: Publication, worker: ActorHandle
) -> list[ray.ObjectRef]:
    references: list[ray.ObjectRef] = worker.rollout.options(num_returns=2).remote(prompt, plan, group_size, *weights)
    return references
