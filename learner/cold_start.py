"""Stage 1, the cold start: the loop's twin without rollouts, since AC-DMD needs neither rewards nor workers.

learner.cold_start: roll the student to a random step ──► fake score ──► (every k-th) student
"""

from __future__ import annotations

from ray.actor import ActorHandle

from common.types import Position, Stage, UpdateResult
from learner.driver.calls import answer
from learner.loop import Milestones
from learner.records.metrics_log import Tracker


def run_cold_start(
    learner: ActorHandle, tracker: Tracker, milestones: Milestones, *, start: int, iterations: int
) -> None:
    """Distil from iteration `start` up to `iterations`."""
    for iteration in range(start, iterations):
        with tracker.iteration(Stage.COLD_START, iteration) as step:
            with step.timed("wait_update"):
                result: UpdateResult = answer(learner.cold_start.remote(iteration))
            step.record_update(result)
        milestones.after(Position(Stage.COLD_START, iteration + 1))
