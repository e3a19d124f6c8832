"""THE loop: stage 2, RTDMD as a distributed service; below it stage 1, which needs only the learner.

    prompts, StepPlan ──► rollouts.request ──► workers: sample 4 steps, decode, score ──► ScoredGroup references
                             ▲                                                               │
         weights vN+1        │                                        rollouts.collect ◄─────┘  (waits: all groups of N)
              │              │                                               │
              └──── publisher.publish ◄── learner.align: fake score, student ◄┘                 (waits: the update)

Iteration N trains on groups sampled with the weights of version max(0, N - max_staleness): with 0 the run is
synchronous, with k the workers sample k iterations ahead. The staleness is exact, not just bounded, so a run is
reproducible with any number, speed or placement of its workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from common.types import Position, Prompt, Stage, StepPlan
from learner.driver.durable_learner import DurableLearner
from learner.driver.ledger import Ledger
from learner.driver.publisher import Publisher
from learner.driver.rollouts import Rollouts
from learner.records.metrics_log import Tracker


class Milestones(Protocol):
    """Periodic work: evaluations and checkpoints."""

    def after(self, position: Position) -> None: ...


def run_alignment(
    learner: DurableLearner,
    publisher: Publisher,
    rollouts: Rollouts,
    ledger: Ledger,
    plan_for: Callable[[int], tuple[StepPlan, Sequence[Prompt]]],
    tracker: Tracker,
    milestones: Milestones,
    *,
    start: int,
    iterations: int,
    max_staleness: int,
) -> None:
    """Train from iteration `start` up to `iterations`; every wait has a timeout and fails with a named error."""
    requested = start
    for iteration in range(start, iterations):
        with tracker.iteration(Stage.ALIGNMENT, iteration) as step:
            weights = publisher.publish(iteration, averaged=False)
            while requested < min(iterations, iteration + 1 + max_staleness):
                plan, prompts = plan_for(requested)
                rollouts.request(plan, prompts, weights)
                requested += 1
            with step.timed("wait_rollouts"):
                collected = rollouts.collect(iteration)
            with step.timed("wait_update"):
                result = learner.align(collected.groups, rollouts.check)
            step.record(collected, result)
        ledger.record(collected.ends)
        milestones.after(Position(Stage.ALIGNMENT, iteration + 1))


def run_cold_start(
    learner: DurableLearner, tracker: Tracker, milestones: Milestones, *, start: int, iterations: int
) -> None:
    """Run stage 1, from iteration `start` up to `iterations`: it needs neither rewards nor workers."""
    for iteration in range(start, iterations):
        with tracker.iteration(Stage.COLD_START, iteration) as step:
            with step.timed("wait_update"):
                result = learner.cold_start(iteration)
            step.record_update(result)
        milestones.after(Position(Stage.COLD_START, iteration + 1))
