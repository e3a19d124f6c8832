"""The same scenario with real workers: Ray actors on this machine that wait where a worker would compute.

The loop, the pool and the calls are real, and so is the time. The learner waits in the driver's process. Waiting needs
no processor, so a small machine can hold several workers, unless others use all of its processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import Lock
from typing import NamedTuple

import numpy as np
import ray

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
    """Notes time, trained groups and the driver's processor seconds after each iteration."""

    def __init__(self, learner: WaitingLearner) -> None:
        self._learner = learner
        self.after_iteration: dict[int, tuple[float, int, float]] = {}

    def after(self, position: Position) -> None:
        self.after_iteration[position.iteration] = (time.monotonic(), self._learner.trained, time.process_time())


class Measured(NamedTuple):
    """Trained groups per second, and processor seconds of the driver's process per group, Ray's threads included."""

    groups_per_s: float
    driver_cpu_s: float


def measure(scenario: Scenario) -> Measured:
    """Run a scenario without faults with real workers. Ray must be initialised."""
    actor = ray.remote(
        num_cpus=0, max_concurrency=CALLS_PER_WORKER, concurrency_groups={HEALTH: 1}, runtime_env=actor_environment()
    )(WaitingWorker)
    learner = WaitingLearner(scenario)
    clock = _Clock(learner)
    fleet = Fleet(lambda: actor.remote(scenario), scenario.workers, 0, scenario.unhealthy_after_s)
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
    started, before, cpu_before = clock.after_iteration[scenario.warm]
    ended, after, cpu_after = clock.after_iteration[scenario.warm + scenario.measured]
    groups = after - before
    return Measured(groups / (ended - started), (cpu_after - cpu_before) / groups)
