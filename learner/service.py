"""A running service: learner, workers and everything a stage needs, and the order in which a run goes through them.

    teacher measured ─► cold start ─► measured ─► alignment ─► measured ─► export, summary, report

Composed by `learner/main.py`; what is measured or checkpointed already is not repeated on resume.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from common import seeding
from common.config import Config
from common.errors import CheckpointError
from common.types import Prompt, StepPlan
from learner.checkpoint import Position, latest_checkpoint, read_position
from learner.cold_start import run_cold_start
from learner.evaluate import evaluate
from learner.loop import run_alignment
from learner.milestones import EVALUATION_VERSION, RunMilestones
from learner.policies import PolicyRecords
from learner.report import write_report
from learner.rollouts import Rollouts
from learner.tracker import Tracker
from learner.worker_pool import WorkerPool


@dataclass(frozen=True)
class PolicySpecs:
    """How each policy of the final comparison samples (`rollout_workers.sampler.SamplingSpec`s)."""

    teacher: object
    teacher_few_steps: object
    student: object


@dataclass(frozen=True)
class Service:
    """The parts of a run, alive."""

    config: Config
    run_dir: Path
    learner: ActorHandle
    sigmas: tuple[float, ...]
    pool: WorkerPool
    tracker: Tracker
    records: PolicyRecords
    train_prompts: Sequence[Prompt]
    evaluation_prompts: Sequence[Prompt]
    specs: PolicySpecs
    health_check: Callable[[], None]

    def run(self, *, resume: bool) -> None:
        """Both stages and everything measured on the way."""
        started = time.perf_counter()
        config = self.config
        teacher, few_steps = f"teacher_{config.evaluation.teacher_steps}", f"teacher_{config.sampling.steps}"
        position = self._restore(resume=resume)
        milestones = RunMilestones(
            config,
            self.run_dir,
            self.learner,
            self.pool,
            self.tracker,
            self.evaluation_prompts,
            self.specs.student,
            continuity(config),
        )
        self._measure(teacher, self.specs.teacher)
        self._measure(few_steps, self.specs.teacher_few_steps)
        if position.stage == "cold_start":
            run_cold_start(
                self.learner,
                self.tracker,
                milestones,
                start=position.iteration,
                iterations=config.cold_start.iterations,
            )
            position = Position("cold_start", config.cold_start.iterations)
            milestones.checkpoint(position)
            self._measure("cold_start", self.specs.student)
            ray.get(self.learner.begin_alignment.remote())
            position = Position("alignment", 0)
        run_alignment(
            self.learner,
            Rollouts(self.pool, config.alignment.group_size),
            self._plan,
            self.tracker,
            milestones,
            start=position.iteration,
            iterations=config.alignment.iterations,
            max_staleness=config.alignment.max_staleness,
        )
        position = Position("alignment", config.alignment.iterations)
        milestones.checkpoint(position)
        self._measure("rtdmd", self.specs.student)
        self._finish([teacher, few_steps, "cold_start", "rtdmd"], time.perf_counter() - started)

    def _restore(self, *, resume: bool) -> Position:
        """Where to start: a checkpoint of this run, the cold start of another, or the beginning."""
        checkpoint = latest_checkpoint(self.run_dir / "checkpoints") if resume else None
        if checkpoint is not None:
            position: Position = ray.get(self.learner.restore.remote(checkpoint, continuity(self.config)))
            self.tracker.message(f"resuming after {position.iteration} iterations of {position.stage}")
            return position
        borrowed = self.config.cold_start.from_checkpoint
        if borrowed is not None:
            if read_position(borrowed).stage != "cold_start":
                raise CheckpointError(f"cold_start.from_checkpoint: {borrowed} is not a checkpoint of the cold start")
            ray.get(self.learner.restore.remote(borrowed, None))
            return Position("cold_start", self.config.cold_start.iterations)
        return Position("cold_start", 0)

    def _plan(self, iteration: int) -> tuple[StepPlan, list[Prompt]]:
        """What iteration `iteration` samples: a function of the seed and the iteration alone."""
        config, seed = self.config, self.config.run.seed
        stochastic = config.sampling.steps - 1
        selected = tuple(range(stochastic))
        if config.alignment.policy_gradient == "subgrpo":
            selected = seeding.selected_steps(seed, iteration, stochastic, config.alignment.selected_steps)
        chosen = seeding.prompt_indices(
            seed, iteration, config.alignment.prompts_per_iteration, len(self.train_prompts)
        )
        return StepPlan(iteration, self.sigmas, config.sampling.eta, selected), [self.train_prompts[i] for i in chosen]

    def _measure(self, policy: str, spec: object) -> None:
        """Evaluate a policy for the final comparison, unless that has been done."""
        if self.records.has(policy):
            return
        self.health_check()
        started, settings = time.perf_counter(), self.config.evaluation
        weights = self.learner.publish.remote(EVALUATION_VERSION, averaged=True)
        prompts = self.evaluation_prompts[: settings.final_prompts]
        evaluation = evaluate(self.pool, prompts, spec, settings.final_images_per_prompt, weights)
        seconds = time.perf_counter() - started
        self.records.add(policy, evaluation, seconds)
        self.tracker.policy(policy, evaluation.metrics, seconds)

    def _finish(self, policies: list[str], seconds: float) -> None:
        ray.get(self.learner.export.remote(self.run_dir / "lora"))
        self.records.write_gallery(policies)
        summary: dict[str, Any] = {
            "policies": {policy: self.records.metrics(policy) for policy in policies},
            "seconds": {"total": seconds, **self.tracker.totals()},
            "run": {"name": self.config.run.name, "seed": self.config.run.seed},
        }
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
        self.tracker.message(f"report: {write_report(self.run_dir)}")


def continuity(config: Config) -> dict[str, Any]:
    """The settings a checkpoint depends on: a run that goes on under others would not be the same run."""
    whole = config.model_dump(mode="json")
    kept = {key: whole[key] for key in ("backbone", "lora", "sampling", "cold_start", "alignment", "prompts")}
    kept["alignment"] = {k: v for k, v in kept["alignment"].items() if k not in ("iterations", "micro_batch")}
    kept["rewards"] = {r.name: {"weight": r.weight, "differentiable": r.differentiable} for r in config.rewards}
    kept["seed"] = config.run.seed
    return kept
