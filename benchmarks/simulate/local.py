"""The same scenario with real workers: Ray actors on this machine that wait where a worker would compute.

The loop, the pool and the calls are real, and so is the time. The learner waits in the driver's process. Waiting needs
no processor, so a small machine can hold several workers, unless others use all of its processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import Lock, Semaphore
from typing import NamedTuple

import numpy as np
import ray
from ray.actor import ActorHandle

from benchmarks.simulate.run import GROUP_SIZE, NoRecords, planned
from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.worker import BASE
from common.group_ends import DueGroup, GroupFault
from common.heartbeat import Heartbeat
from common.progress import Progress
from common.types import (
    ByteArray,
    PolicyVersion,
    Position,
    ProcessPlace,
    Prompt,
    RolloutOutcome,
    StepPlan,
    UpdateResult,
)
from learner.driver.call_queue import CALLS_PER_WORKER
from learner.driver.cluster import actor_environment
from learner.driver.durable_learner import DurableLearner
from learner.driver.fleet import Fleet
from learner.driver.ledger import Ledger
from learner.driver.machines import RayMachines
from learner.driver.publisher import Publisher
from learner.driver.rollouts import Rollouts
from learner.driver.worker_pool import HEALTH, WorkerPool
from learner.loop import run_alignment


@dataclass(frozen=True)
class Version:
    """A version of the weights."""

    number: int
    payload: ByteArray


class WaitingWorker:
    """A worker whose model and rewards only take time."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._progress = Progress(ray.get_runtime_context().get_node_id())
        self._model, self._version = Lock(), -1
        self._random = Random(self._progress.place.pid)

    def ready(self) -> tuple[str, ProcessPlace]:
        return BASE, self._progress.place

    def heartbeat(self) -> Heartbeat:
        return self._progress.heartbeat()

    def rollout(
        self,
        prompt: Prompt,  # noqa: ARG002
        plan: StepPlan,  # noqa: ARG002
        group_size: int,  # noqa: ARG002
        weights: Version,
        frozen: Version,  # noqa: ARG002
        *,
        pictured: bool,  # noqa: ARG002
    ) -> tuple[RolloutOutcome, ByteArray]:
        """Wait for the model, and as long as it would take; then for the scores."""
        with self._progress.call() as call:
            with self._model:
                call.begin("rollout")
                applied_s = self._scenario.apply_s if weights.number != self._version else 0.0
                self._version = weights.number
                time.sleep(applied_s + self._spread(self._scenario.sample_s))
            call.begin("score")
            time.sleep(self._spread(self._scenario.score_s))
        version = PolicyVersion(weights.number, "")
        outcome = RolloutOutcome(str(self._progress.place), version, call.seconds, digest="whole")
        return outcome, np.zeros(self._scenario.group_bytes, np.uint8)

    def _spread(self, seconds: float) -> float:
        return seconds * max(0.1, self._random.gauss(1.0, self._scenario.jitter))


class WaitingLearner(DurableLearner):
    """A learner that only takes time. `trained`: number of groups."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.trained = 0

    def frozen_weights(self) -> ray.ObjectRef[Version]:
        return self._put(-1)

    def publish(self, number: int, *, averaged: bool) -> ray.ObjectRef[Version]:  # noqa: ARG002
        time.sleep(self._scenario.publish_s)
        return self._put(number)

    def attested(self, group: ray.ObjectRef[ByteArray], due: DueGroup) -> GroupFault | None:  # noqa: ARG002
        """Fetch a group."""
        return None if ray.get(group).nbytes == self._scenario.group_bytes else GroupFault.DAMAGED

    def align(self, groups: Sequence[ray.ObjectRef[ByteArray]], watch: Callable[[], None]) -> UpdateResult:
        watch()
        time.sleep(self._scenario.update_s)
        self.trained += len(groups)
        return UpdateResult({}, {})

    def _put(self, number: int) -> ray.ObjectRef[Version]:
        return ray.put(Version(number, np.zeros(self._scenario.adapter_bytes, np.uint8)))


class _Clock:
    """Notes time and trained groups after each iteration."""

    def __init__(self, learner: WaitingLearner) -> None:
        self._learner = learner
        self.after_iteration: dict[int, tuple[float, int]] = {}

    def after(self, position: Position) -> None:
        self.after_iteration[position.iteration] = (time.monotonic(), self._learner.trained)


class CallCosts(NamedTuple):
    """Processor milliseconds of the driver's process per call, those of Ray's threads included."""

    ping_ms: float
    rollout_ms: float


def _started(scenario: Scenario) -> ActorHandle:
    actor = ray.remote(
        num_cpus=0, max_concurrency=CALLS_PER_WORKER, concurrency_groups={HEALTH: 1}, runtime_env=actor_environment()
    )(WaitingWorker)
    return actor.remote(scenario)


def call_costs(scenario: Scenario, count: int = 500) -> CallCosts:
    """The costs of calls of one worker that takes no time, at the pace of a large cluster. Ray must be initialised."""
    worker = _started(replace(scenario, sample_s=0.0, score_s=0.0, apply_s=0.0))
    ray.get(worker.ready.remote())
    learner = WaitingLearner(replace(scenario, publish_s=0.0))
    weights, (plan, prompts) = Publisher(learner).publish(0, averaged=False), planned(scenario)(0)

    def ping() -> ray.ObjectRef:
        return worker.heartbeat.options(concurrency_group=HEALTH).remote()

    def rollout() -> ray.ObjectRef:
        method = worker.rollout.options(num_returns=2)
        return method.remote(prompts[0], plan, GROUP_SIZE, *weights, pictured=False)[0]

    costs = CallCosts(_cost_ms(ping, count), _cost_ms(rollout, count))
    ray.kill(worker)
    return costs


def _cost_ms(call: Callable[[], ray.ObjectRef], count: int) -> float:
    """Per call, of calls whose answers come as futures, at 200 per second."""
    answered = Semaphore(0)
    before = time.process_time()
    for _ in range(count):
        call().future().add_done_callback(lambda _: answered.release())
        time.sleep(1 / 200)
    for _ in range(count):
        answered.acquire()
    return 1000 * (time.process_time() - before) / count


def measure(scenario: Scenario) -> float:
    """Trained groups per second of a scenario without faults, with real workers. Ray must be initialised."""
    learner = WaitingLearner(scenario)
    clock = _Clock(learner)
    fleet = Fleet(lambda _: _started(scenario), scenario.workers, 0, scenario.unhealthy_after_s)
    with TemporaryDirectory() as folder, WorkerPool(fleet, RayMachines(), scenario.unhealthy_after_s) as pool:
        pool.admit(BASE, scenario.workers)
        run_alignment(
            learner,
            Publisher(learner),
            Rollouts(pool, GROUP_SIZE, learner.attested),
            Ledger(Path(folder)),
            planned(scenario),
            NoRecords(),
            clock,
            start=0,
            iterations=scenario.iterations,
            max_staleness=scenario.max_staleness,
        )
    started, before = clock.after_iteration[scenario.warm]
    ended, after = clock.after_iteration[scenario.warm + scenario.measured]
    return (after - before) / (ended - started)
