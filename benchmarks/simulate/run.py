"""Runs a scenario: the driver's pool, rollouts, publisher and ledger, on simulated workers, learner and network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.simulate.cluster import LEARNER_MACHINE, Cluster
from benchmarks.simulate.learner import SimulatedLearner
from benchmarks.simulate.scenario import Figures, Scenario
from benchmarks.simulate.timeline import Timeline, VirtualEvents
from benchmarks.simulate.worker import BASE
from common.types import Prompt, StepPlan
from learner.driver.fleet import Fleet
from learner.driver.ledger import LEDGER, Ledger
from learner.driver.publisher import Publisher
from learner.driver.rollouts import Rollouts
from learner.driver.worker_pool import WorkerPool

GROUP_SIZE = 24
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)


def simulate(scenario: Scenario, say: Callable[[str], None] = lambda _: None) -> Figures:
    """The figures of a scenario. The same scenario gives the same ones, but for the driver's processor seconds."""
    timeline = Timeline()
    cluster = Cluster(timeline, scenario)
    learner = SimulatedLearner(timeline, cluster, scenario)
    fleet = Fleet(cluster.start, scenario.workers, scenario.restarts, scenario.unhealthy_after_s, timeline)
    pool = WorkerPool(
        fleet, cluster, scenario.unhealthy_after_s, say=say, clock=timeline, events=VirtualEvents(timeline)
    )
    with TemporaryDirectory() as folder, pool:
        pool.admit(BASE, scenario.workers)
        run = _Run(scenario, timeline, cluster, learner, pool, Path(folder))
        return run.figures()


class _Run:
    """The iterations of `learner.loop.run_alignment`, with a look at the start and the end of the measured ones."""

    def __init__(
        self,
        scenario: Scenario,
        timeline: Timeline,
        cluster: Cluster,
        learner: SimulatedLearner,
        pool: WorkerPool,
        folder: Path,
    ) -> None:
        self._scenario, self._timeline, self._cluster, self._learner = scenario, timeline, cluster, learner
        self._publisher = Publisher(learner)
        self._rollouts = Rollouts(pool, GROUP_SIZE, learner.attest, clock=timeline)
        self._ledger, self._file = Ledger(folder), folder / LEDGER
        self._requested = 0
        self._trained = 0

    def figures(self) -> Figures:
        scenario, journal = self._scenario, self._cluster.journal
        self._iterate(0, scenario.warm)
        before = self._so_far()
        self._iterate(scenario.warm, scenario.measured)
        seconds, trained, busy_s, calls, cpu_s = (
            after - start for start, after in zip(before, self._so_far(), strict=True)
        )
        self._iterate(scenario.warm + scenario.measured, scenario.max_staleness)
        versions = [version.shared for version in self._learner.versions[scenario.warm :]]
        return Figures(
            groups_per_s=trained / seconds,
            worker_busy=busy_s / seconds / scenario.workers,
            worst_age=self._learner.worst_age,
            wasted=1 - self._trained / journal.sampled,
            ends=len(self._file.read_text(encoding="utf-8").splitlines()),
            payloads=max(version.sent[LEARNER_MACHINE] for version in versions),
            broadcast_s=max(max(version.pulls_s, default=0.0) for version in versions),
            recovery_s=max(journal.recoveries_s, default=0.0),
            faults=journal.faults,
            driver_cores=cpu_s / seconds,
            calls_per_s=calls / seconds,
        )

    def _so_far(self) -> tuple[float, ...]:
        """Virtual seconds, trained groups, seconds of models, calls, and processor seconds of the driver."""
        journal = self._cluster.journal
        cpu_s = time.process_time() - self._timeline.simulated_cpu_s
        return self._timeline.now, self._trained, journal.busy_s, journal.calls + self._learner.calls, cpu_s

    def _iterate(self, start: int, count: int) -> None:
        """What `run_alignment` does in so many iterations. A machine may be lost in each."""
        scenario = self._scenario
        for iteration in range(start, start + count):
            if self._cluster.random.random() < scenario.lost_machines:
                self._timeline.after(self._cluster.random.uniform(0.0, scenario.update_s), self._cluster.lose_machine)
            weights = self._publisher.publish(iteration, averaged=False)
            while self._requested < min(scenario.iterations, iteration + 1 + scenario.max_staleness):
                plan = StepPlan(self._requested, SIGMAS, 0.9, (0, 1))
                prompts = [Prompt(index, f"prompt {index}") for index in range(scenario.groups)]
                self._rollouts.request(plan, prompts, weights)
                self._requested += 1
            collected = self._rollouts.collect(iteration)
            self._learner.align(collected.groups)
            self._trained += len(collected.groups)
            self._ledger.record(collected.ends)
