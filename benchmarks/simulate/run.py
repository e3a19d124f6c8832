"""Runs a scenario: the driver's loop, pool, rollouts, publisher and ledger, on simulated actors and network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.simulate.cluster import LEARNER_MACHINE, Cluster
from benchmarks.simulate.learner import SimulatedLearner
from benchmarks.simulate.scenario import Figures, Scenario
from benchmarks.simulate.timeline import Timeline, VirtualEvents
from benchmarks.simulate.worker import BASE
from common.types import Position, Prompt, StepPlan
from learner.driver.fleet import Fleet
from learner.driver.ledger import LEDGER, Ledger
from learner.driver.publisher import Publisher
from learner.driver.rollouts import Rollouts
from learner.driver.worker_pool import WorkerPool
from learner.loop import run_alignment
from learner.records.metrics_log import StepRecord, Tracker

GROUP_SIZE = 24
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)


class NoRecords(Tracker):
    """Records of iterations that nobody reads."""

    def __init__(self) -> None:
        """There is no file."""

    @contextmanager
    def iteration(self, stage: str, iteration: int) -> Iterator[StepRecord]:  # noqa: ARG002
        yield StepRecord()


def simulate(scenario: Scenario, say: Callable[[str], None] = lambda _: None) -> Figures:
    """The figures of a scenario. The same scenario gives the same ones, but for the driver's processor seconds."""
    timeline = Timeline()
    cluster = Cluster(timeline, scenario)
    learner = SimulatedLearner(timeline, cluster, scenario)
    fleet = Fleet(cluster.start, scenario.workers, scenario.restarts, scenario.unhealthy_after_s, timeline)
    pool = WorkerPool(
        fleet, cluster, scenario.unhealthy_after_s, say=say, clock=timeline, events=VirtualEvents(timeline)
    )
    meter = Meter(scenario, timeline, cluster, learner)
    with TemporaryDirectory() as folder, pool:
        pool.admit(BASE, scenario.workers)
        run_alignment(
            learner,
            Publisher(learner),
            Rollouts(pool, GROUP_SIZE, learner.attested, clock=timeline),
            Ledger(Path(folder)),
            planned(scenario),
            NoRecords(),
            meter,
            start=0,
            iterations=scenario.iterations,
            max_staleness=scenario.max_staleness,
        )
        return meter.figures(Path(folder) / LEDGER)


def planned(scenario: Scenario) -> Callable[[int], tuple[StepPlan, list[Prompt]]]:
    """The plan and prompts of an iteration."""
    prompts = [Prompt(index, f"prompt {index}") for index in range(scenario.groups)]
    return lambda iteration: (StepPlan(iteration, SIGMAS, 0.9, (0, 1)), prompts)


class Meter:
    """Measures after each iteration, and has a machine lost in some."""

    def __init__(self, scenario: Scenario, timeline: Timeline, cluster: Cluster, learner: SimulatedLearner) -> None:
        self._scenario, self._timeline, self._cluster, self._learner = scenario, timeline, cluster, learner
        self._after: dict[int, tuple[float, ...]] = {}

    def after(self, position: Position) -> None:
        """Virtual seconds, trained groups, seconds of models, calls, and processor seconds of the driver, so far."""
        journal, cpu_s = self._cluster.journal, time.process_time() - self._timeline.simulated_cpu_s
        calls = journal.calls + self._learner.calls
        self._after[position.iteration] = (self._timeline.now, self._learner.trained, journal.busy_s, calls, cpu_s)
        share = self._scenario.lost_machines
        if int(share * position.iteration) > int(share * (position.iteration - 1)):
            self._timeline.after(self._cluster.random.random(), self._cluster.lose_machine)

    def figures(self, ledger: Path) -> Figures:
        scenario, journal = self._scenario, self._cluster.journal
        start, end = self._after[scenario.warm], self._after[scenario.warm + scenario.measured]
        seconds, trained, busy_s, calls, cpu_s = (after - before for before, after in zip(start, end, strict=True))
        versions = [version.shared for version in self._learner.versions[scenario.warm :]]
        return Figures(
            groups_per_s=trained / seconds,
            worker_busy=busy_s / seconds / scenario.workers,
            worst_age=self._learner.worst_age,
            wasted=1 - self._learner.trained / journal.sampled,
            ends=len(ledger.read_text(encoding="utf-8").splitlines()),
            payloads=max(version.sent[LEARNER_MACHINE] for version in versions),
            broadcast_s=max(max(version.pulls_s, default=0.0) for version in versions),
            recovery_s=max(journal.recoveries_s, default=0.0),
            faults=journal.faults,
            driver_cores=cpu_s / seconds,
            calls_per_s=calls / seconds,
        )
