"""A running service: learner, workers and the parts of each stage, and the order of a run.

    evaluate teacher ─► cold start ─► evaluate ─► alignment ─► evaluate ─► export, summary, report

`learner/compose.py` composes it. On resume, results that exist as evaluations or checkpoints are not repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from common import seeding
from common.config.run import Config
from common.errors import CheckpointError, RtdmdError
from common.group_ends import DueGroup, GroupFault
from common.policies import SamplingSpec
from common.prompts import prompts_fingerprint
from common.run_control import RunControl
from common.types import Position, Prompt, PromptSets, Stage, StepPlan
from common.whole_files import write_whole
from learner.driver.between_iterations import EVALUATION_VERSION, RunMilestones
from learner.driver.checkpoint_writer import CheckpointWriter
from learner.driver.comparison import PolicyRecords
from learner.driver.durable_learner import DurableLearner
from learner.driver.evaluation import evaluate
from learner.driver.ledger import Ledger
from learner.driver.publisher import Publisher
from learner.driver.rollouts import Pictured, Rollouts
from learner.driver.run_copies import copied_run
from learner.driver.run_directory import Start
from learner.driver.watchdog import Watchdog, Watched
from learner.driver.worker_pool import WorkerPool
from learner.loop import run_alignment, run_cold_start
from learner.preflight.forecast import Prediction, compared
from learner.records.metrics_log import Tracker
from learner.records.prometheus import RunMetrics
from learner.records.report import write_report

if TYPE_CHECKING:
    from common.sealed_group import SealedGroup


@dataclass(frozen=True)
class PolicySpecs:
    """Sampling of each policy in the final comparison."""

    teacher: SamplingSpec
    teacher_few_steps: SamplingSpec
    student: SamplingSpec


@dataclass(frozen=True)
class Service:
    """The started parts of a run."""

    config: Config
    run_dir: Path
    learner: DurableLearner
    publisher: Publisher
    sigmas: tuple[float, ...]
    pool: WorkerPool
    tracker: Tracker
    metrics: RunMetrics
    records: PolicyRecords
    prompts: PromptSets
    specs: PolicySpecs
    control: RunControl | None
    prediction: Prediction | None
    """The forecast of the run's needs; None if the model's sizes are unknown."""
    settings: dict[str, Any]
    """The settings that a checkpoint depends on, see `learner.driver.run_directory.continuity`."""

    def run(self, start: Start) -> None:
        """Run both stages and all evaluations; a failed run leaves a report of what it reached."""
        try:
            with copied_run(self.config.checkpoint.copy_to, self.run_dir) as copy:
                self._run_stages(start, copy)
        except BaseException:  # includes interrupts
            self._report_so_far()
            raise

    def _run_stages(self, start: Start, copy: Callable[[], None]) -> None:
        started, config = time.perf_counter(), self.config
        teacher, few_steps = f"teacher_{config.evaluation.teacher_steps}", f"teacher_{config.sampling.steps}"
        cold_start_end = Position(Stage.COLD_START, config.cold_start.iterations)
        alignment_end = Position(Stage.ALIGNMENT, config.alignment.iterations)
        position = start.position
        if position.stage is Stage.ALIGNMENT:
            self._require_measured("cold_start", self.specs.student, cold_start_end)
        self._restore(start)
        ledger = Ledger(self.run_dir)
        milestones = self._milestones(ledger, copy)
        self.tracker.message(
            f"pictures come into {self.run_dir / 'samples'}, the report into {self.run_dir / 'report.html'} at the end "
            "or when you interrupt the run"
        )
        policies = ["cold_start", "rtdmd"]
        if config.evaluation.teacher:
            policies = [teacher, few_steps, *policies]
            self._measure(teacher, self.specs.teacher, None)
            self._measure(few_steps, self.specs.teacher_few_steps, None)
        if position.stage is Stage.COLD_START:
            run_cold_start(
                self.learner, self.tracker, milestones, start=position.iteration, iterations=cold_start_end.iteration
            )
            milestones.checkpoint(cold_start_end)
            self._measure("cold_start", self.specs.student, cold_start_end)
            self.learner.begin_alignment()
            self.publisher.begin_stage()
            position = Position(Stage.ALIGNMENT, 0)
            milestones.begin_alignment()
        run_alignment(
            self.learner,
            self.publisher,
            Rollouts(
                self.pool,
                config.alignment.group_size,
                self._attested,
                self._outage_limit_s(),
                pictured=Pictured(config.dashboard.groups, config.dashboard.groups_every),
                metrics=self.metrics,
            ),
            ledger,
            self._plan,
            self.tracker,
            milestones,
            start=position.iteration,
            iterations=alignment_end.iteration,
            max_staleness=config.alignment.max_staleness,
        )
        milestones.checkpoint(alignment_end)
        self._measure("rtdmd", self.specs.student, alignment_end)
        self._finish(policies, time.perf_counter() - started)

    def _attested(self, group: ray.ObjectRef[SealedGroup], due: DueGroup) -> GroupFault | None:
        """Have the learner fetch and check a group."""
        return self.learner.attest(group, due, self.pool.check)

    def _outage_limit_s(self) -> float:
        """Seconds that an outage may leave an iteration without any group, for rewards that do not pause the run."""
        rewards = [r for r in self.config.rewards if r.trained and not r.outage.holds_requests]
        return max((reward.outage_limit_s for reward in rewards), default=0.0)

    def _milestones(self, ledger: Ledger, copy: Callable[[], None]) -> RunMilestones:
        watchdog = Watchdog(Watched.of(self.config), self.run_dir)
        lines = (self.tracker.lines, ledger.lines, watchdog.lines)
        checkpoints = CheckpointWriter(
            self.config.checkpoint, self.run_dir, self.learner, self.tracker, self.settings, lines, copy
        )
        return RunMilestones(
            self.config,
            self.run_dir,
            self.publisher,
            self.pool,
            self.tracker,
            checkpoints,
            watchdog,
            self.prompts.evaluation,
            self.specs.student,
            self.control,
        )

    def _restore(self, start: Start) -> None:
        if start.checkpoint is None:
            return
        self.learner.restore(start.checkpoint, start.settings)
        self.publisher.begin_stage()
        if start.resumes:
            self.tracker.message(f"resuming after {start.position.iteration} iterations of {start.position.stage}")

    def _plan(self, iteration: int) -> tuple[StepPlan, list[Prompt]]:
        """The plan and prompts of an iteration: a function of the seed and the iteration alone."""
        config, seed = self.config, self.config.run.seed
        stochastic = config.sampling.steps - 1
        selected = tuple(range(stochastic))
        if config.alignment.policy_gradient == "subgrpo":
            selected = seeding.selected_steps(seed, iteration, stochastic, config.alignment.selected_steps)
        prompts = self.prompts.alignment
        chosen = seeding.prompt_indices(seed, iteration, config.alignment.prompts_per_iteration, len(prompts))
        plan = StepPlan(iteration, self.sigmas, config.sampling.eta, selected, config.alignment.same_latent)
        return plan, [prompts[i] for i in chosen]

    def _measure(self, policy: str, spec: SamplingSpec, trained: Position | None) -> None:
        """Evaluate a policy for the final comparison, unless that was done; `trained` is None for the teacher."""
        basis = self._basis(spec, trained)
        if self.records.has(policy, basis):
            self.metrics.evaluated(policy, self.records.metrics(policy), 0.0)
            return
        started, settings = time.perf_counter(), self.config.evaluation
        weights = None if trained is None else self.publisher.publish(EVALUATION_VERSION, averaged=True)
        evaluation = evaluate(
            self.pool,
            self._final_prompts(),
            spec,
            settings.final_images_per_prompt,
            weights,
            group_size=self.config.alignment.group_size,
        )
        seconds = time.perf_counter() - started
        self.records.add(policy, basis, evaluation, seconds)
        self.tracker.policy(policy, evaluation.metrics, seconds)
        self.tracker.message(f"pictures of {policy}: {self.records.first_picture(policy)}")

    def _basis(self, spec: SamplingSpec, trained: Position | None) -> dict[str, Any]:
        """Everything that a policy's numbers depend on and that a resumed run might have changed."""
        prompts = self._final_prompts()
        return {
            "spec": repr(spec),
            "trained": None if trained is None else trained.directory,
            "prompts": len(prompts),
            "prompts_fingerprint": prompts_fingerprint(prompts),
            "images_per_prompt": self.config.evaluation.final_images_per_prompt,
            "seed": self.config.run.seed,
            "rewards": [reward.name for reward in self.config.rewards],
        }

    def _final_prompts(self) -> Sequence[Prompt]:
        settings = self.config.evaluation
        return self.prompts.evaluation[settings.final_from :][: settings.final_prompts]

    def _require_measured(self, policy: str, spec: SamplingSpec, trained: Position) -> None:
        """CheckpointError if the policy was not evaluated: after more training the student can no longer be."""
        if not self.records.has(policy, self._basis(spec, trained)):
            raise CheckpointError(
                f"{self.run_dir}: {policy} was not evaluated with these evaluation settings, prompts and rewards, and "
                "its weights have changed since: restore them, or use another --run-dir"
            )

    def _finish(self, policies: list[str], seconds: float) -> None:
        self.learner.export(self.run_dir / "lora")
        self.records.write_gallery(policies)
        totals = self.tracker.totals()
        summary: dict[str, Any] = {
            "policies": {policy: self.records.metrics(policy) for policy in policies},
            "seconds": {"total": seconds, **totals},
            "run": {"name": self.config.run.name, "seed": self.config.run.seed},
        }
        iterations = self.config.alignment.iterations
        if self.prediction is not None and iterations > 0:
            summary["plan"] = compared(self.prediction, self.learner.peak_gib(), totals["alignment"] / iterations)
        write_whole(self.run_dir / "summary.json", json.dumps(summary, indent=1).encode())
        self.tracker.message(f"report: {write_report(self.run_dir)}")

    def _report_so_far(self) -> None:
        if (self.run_dir / "metrics.jsonl").stat().st_size == 0:
            return
        try:
            self.tracker.message(f"report so far: {write_report(self.run_dir)}")
        except (RtdmdError, OSError) as error:
            # The error that ended the run is reported; this one must not replace it.
            self.tracker.message(f"no report: {error}")
