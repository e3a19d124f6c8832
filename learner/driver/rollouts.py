"""Requests the groups of an iteration from the workers and collects them, scored, in the order of the requests.

A group whose score failed is requested again, then dropped whole and counted by cause; its rewards never become zeros.
The learner fetches and checks each group as soon as it is scored, while others are sampled. One that it refuses is
requested again as well.

An iteration that an outage leaves without any group is sampled again until the rewards recover, for a bounded time.
The driver sees a group's `RolloutOutcome`. The group itself goes from the object store to the learner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from prometheus_client import CollectorRegistry
from ray.actor import ActorHandle

from common.errors import AttestationError, RewardInvalid, RewardOutage
from common.group_ends import DueGroup, GroupEnd, GroupFault, GroupOutcome, RefusedGroup
from common.rewards.api import REQUEST_CAUSES
from common.types import Collected, Prompt, RolloutOutcome, ScoringFailure, StepPlan
from learner.driver.call_queue import Call
from learner.driver.publisher import Publication
from learner.driver.worker_pool import Finished, WorkerPool
from learner.records.prometheus import RunMetrics

if TYPE_CHECKING:
    from common.sealed_group import SealedGroup

Attest = Callable[["ray.ObjectRef[SealedGroup]", DueGroup], GroupFault | None]
"""Has the learner fetch and check a group; None if it may be trained on."""
GROUP_ATTEMPTS = 2
"""A group is sampled and scored this many times before it is dropped; each time includes the client's own retries."""
EMPTY_ITERATION_PAUSE_S = 1.0
"""Pause before sampling an iteration again of which no group could be scored."""


@dataclass(frozen=True)
class _Key:
    iteration: int
    place: int
    attempt: int


@dataclass(frozen=True)
class Pictured:
    """Chooses the groups that are kept as pictures: the first `groups` of every `every`-th iteration."""

    groups: int = 0
    every: int = 1

    def includes(self, iteration: int, place: int) -> bool:
        return place < self.groups and iteration % self.every == 0


NO_PICTURES = Pictured()


@dataclass(frozen=True)
class _Request:
    """A group that is asked for: it can be submitted any number of times."""

    prompt: Prompt
    plan: StepPlan
    group_size: int
    weights: Publication
    pictured: bool

    def call(self, key: _Key) -> Call:
        return Call(key, self._start)

    def _start(self, worker: ActorHandle) -> list[ray.ObjectRef]:
        method = worker.rollout.options(num_returns=2)
        references: list[ray.ObjectRef] = method.remote(
            self.prompt, self.plan, self.group_size, *self.weights, pictured=self.pictured
        )
        return references

    def due(self, digest: str) -> DueGroup:
        return DueGroup(self.prompt, self.plan, self.group_size, digest)


@dataclass(frozen=True)
class _Attempt:
    """A finished sampling of a group; without failure and fault it may be trained on."""

    number: int
    outcome: RolloutOutcome
    group: ray.ObjectRef[SealedGroup]
    fault: GroupFault | None

    def end(self, request: _Request) -> GroupEnd:
        outcome, cause = GroupOutcome.TRAINED, ""
        if self.outcome.failure is not None:
            outcome, cause = GroupOutcome.REWARD_FAILED, _cause(self.outcome.failure)
        elif self.fault is not None:
            stale = self.fault is GroupFault.STALE
            outcome, cause = GroupOutcome.STALE if stale else GroupOutcome.INFRA_DROPPED, _infra(self.fault)
        place = (request.plan.iteration, request.prompt.index)
        return GroupEnd(*place, outcome, self.outcome.worker, self.number, cause)


class Rollouts:
    """Requests groups ahead of time and waits for those of one iteration."""

    def __init__(
        self,
        pool: WorkerPool,
        group_size: int,
        attest: Attest,
        outage_limit_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        pictured: Pictured = NO_PICTURES,
        metrics: RunMetrics | None = None,
    ) -> None:
        """`outage_limit_s`: seconds to keep sampling an iteration that an outage left without any group."""
        self._metrics = metrics or RunMetrics(CollectorRegistry(), "unnamed")
        self._clock = clock
        self._pool = pool
        self._group_size = group_size
        self._attest = attest
        self._outage_limit_s = outage_limit_s
        self._requests: dict[int, list[_Request]] = {}
        self._pictured = pictured

    def check(self) -> None:
        """Raise what has ended the workers, or the servers that they need."""
        self._pool.check()

    def request(self, plan: StepPlan, prompts: Sequence[Prompt], weights: Publication) -> None:
        """Request one group per prompt, sampled with these weights."""
        requests = [
            _Request(prompt, plan, self._group_size, weights, self._pictured.includes(plan.iteration, place))
            for place, prompt in enumerate(prompts)
        ]
        self._requests[plan.iteration] = requests
        for place, request in enumerate(requests):
            self._pool.submit(request.call(_Key(plan.iteration, place, 1)))

    def collect(self, iteration: int) -> Collected:
        """Wait for every group of a requested iteration.

        Raises:
            AttestationError: the learner refused all groups, each time that they were sampled.
            RewardOutage: no group could be scored for as long as an outage may last.
            RewardInvalid: no group could be scored, and waiting would not help.
            WorkerError: see `WorkerPool.take`.
        """
        requests, collected = self._requests.pop(iteration), Collected([])
        first_attempt = 1
        out_since: float | None = None
        while True:
            attempts = self._finish(iteration, requests, first_attempt, collected)
            failure = self._gather(attempts, collected)
            collected.ends = [attempt.end(request) for attempt, request in zip(attempts, requests, strict=True)]
            if collected.groups:
                return collected
            if failure is None:
                raise _none_whole(iteration, collected.refused)
            now = self._clock()
            out_since = now if out_since is None else out_since
            self._require_hope(iteration, failure, now - out_since)
            time.sleep(EMPTY_ITERATION_PAUSE_S)
            first_attempt += GROUP_ATTEMPTS
            for place, request in enumerate(requests):
                self._pool.submit(request.call(_Key(iteration, place, first_attempt)))

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

    def _gather(self, attempts: Sequence[_Attempt], collected: Collected) -> ScoringFailure | None:
        """Add the last attempts of an iteration's groups to `collected`; return the last failure of a reward."""
        failure = None
        for attempt in attempts:
            outcome = attempt.outcome
            for part, seconds in outcome.seconds.items():
                collected.seconds[part] += seconds
            collected.model_s[outcome.worker] += outcome.model_s
            collected.idle_s[outcome.worker] += outcome.seconds.get("idle", 0.0)
            if outcome.failure is not None:
                _drop(collected, _cause(outcome.failure), outcome.failure.message)
                failure = outcome.failure
            elif attempt.fault is not None:
                _drop(collected, _infra(attempt.fault), f"the learner refused what {outcome.worker} sampled")
            else:
                if outcome.picture is not None:
                    collected.pictures[len(collected.groups)] = outcome.picture
                collected.groups.append(attempt.group)
                collected.images[outcome.worker] += self._group_size
                collected.statistics.append(outcome.statistics)
                collected.renormalised.update(_cause(left_out) for left_out in outcome.left_out)
                for reward, spread in outcome.reward_spreads.items():
                    collected.spreads[reward].append(spread)
        return failure

    def _finish(
        self, iteration: int, requests: Sequence[_Request], first_attempt: int, collected: Collected
    ) -> list[_Attempt]:
        """Each group's last attempt, in the order of the prompts."""
        pending = {_Key(iteration, place, first_attempt) for place in range(len(requests))}
        finished: dict[int, _Attempt] = {}
        while pending:
            done = self._pool.take(pending)
            pending.remove(done.key)
            attempt = self._attempted(done, requests[done.key.place])
            if attempt.fault is not None:
                collected.refused.append(RefusedGroup(attempt.outcome.worker, attempt.fault))
            good = attempt.outcome.failure is None and attempt.fault is None
            retried = not good and done.key.attempt - first_attempt + 1 < GROUP_ATTEMPTS
            self._metrics.group_finished(
                attempt.outcome, self._group_size, iteration, retried=retried, fault=attempt.fault
            )
            if not retried:
                finished[done.key.place] = attempt
            else:
                again = _Key(iteration, done.key.place, done.key.attempt + 1)
                self._pool.submit(requests[done.key.place].call(again))
                pending.add(again)
        return [finished[place] for place in sorted(finished)]

    def _attempted(self, done: Finished[_Key], request: _Request) -> _Attempt:
        outcome: RolloutOutcome = done.result
        scored = outcome.failure is None
        fault = self._attest(done.references[1], request.due(outcome.digest)) if scored else None
        return _Attempt(done.key.attempt, outcome, done.references[1], fault)


def _drop(collected: Collected, cause: str, reason: str) -> None:
    collected.dropped[cause] += 1
    collected.reasons[cause] = reason


def _cause(failure: ScoringFailure) -> str:
    return f"{failure.reward}:{failure.cause}"


def _infra(fault: GroupFault) -> str:
    return f"infra:{fault}"


def _none_whole(iteration: int, refused: Sequence[RefusedGroup]) -> AttestationError:
    last = refused[-1]
    return AttestationError(
        f"no group of iteration {iteration} arrived at the learner as it was sampled, in {GROUP_ATTEMPTS} attempts; "
        f"the last one, of worker {last.worker}, was {last.fault}: look for failing memory or network on its machine "
        "and the learner's, and continue with --resume"
    )
