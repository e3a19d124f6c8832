"""The schema of a run file. Every option is one field, with its unit, its reason and a vetted default.

Defaults are the published SD3-M setting of RTDMD (arXiv 2605.26108). Where the paper's text and its released
configuration differ, the configuration counts. A run file (deploy/runs/*.yaml) overrides what its model needs.
Every section is frozen and refuses unknown keys. `learner.preflight.run_file` reads files and overrides.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from common.config.backbones import BackboneConfig
from common.config.processes import LearnerConfig, WorkersConfig, shared_gpus
from common.config.rewards import RedisConfig, RewardClientConfig, RewardConfig, check_rewards
from common.config.section import Section, problem
from common.config.stages import AlignmentConfig, ColdStartConfig, SamplingConfig
from common.config.trackers import TrackersConfig
from common.config.watchdog import WatchdogConfig, check_watchdog
from common.urls import host_fault


class RunIdentity(Section):
    """Name and seed of a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, and of its default directory runs/NAME. Letters, digits, dot, dash and "
        "underscore.",
    )
    seed: NonNegativeInt = Field(
        0, description="Seed of every random draw. Runs with equal seeds and learner.threads are equal."
    )


class LoraConfig(Section):
    """The adapters of student and fake score."""

    rank: PositiveInt = Field(32, description="Rank of each low-rank update.")
    alpha: PositiveInt = Field(64, description="Scale: an update is multiplied by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Endings of the names of linear layers that get an adapter. null: the family's attention "
        "projections. Small models need the feed-forward layers too.",
    )


class PromptsConfig(Section):
    """Prompt files: .txt (one per line), .jsonl ({"prompt": ..., metadata}) or .parquet (a column prompt)."""

    train: Path = Field(description="Prompts that both stages sample from.")
    cold_start: Path | None = Field(
        None,
        description="Prompts of the cold start; null: those of train. Published: PickScore's prompts for the cold "
        "start, GenEval's with metadata for alignment.",
    )
    evaluation: Path = Field(description="Held-out prompts of evaluations, sample grids and the final table.")


class EvaluationConfig(Section):
    """Periodic evaluations, and the evaluation of the final table."""

    every: PositiveInt = Field(50, description="Alignment iterations between two evaluations.")
    cold_start_every: PositiveInt = Field(1000, description="Cold-start iterations between two evaluations.")
    prompts: PositiveInt = Field(64, description="Prompts per evaluation: the first ones of the file.")
    images_per_prompt: int = Field(2, ge=2, description="Images per prompt; diversity needs at least 2.")
    teacher: bool = Field(True, description="Evaluate the teacher too, for the final comparison.")
    teacher_steps: PositiveInt = Field(28, description="Euler steps of the many-step teacher.")
    teacher_guidance: float = Field(7.0, ge=1, description="Guidance scale of the many-step teacher.")
    grid_prompts: PositiveInt = Field(8, description="Prompts of the sample grids and of the report's gallery.")
    final_from: NonNegativeInt = Field(
        0,
        description="Place of the final table's first prompt in the file, from 0. Beyond `prompts`, the table has "
        "places of its own, apart from those of the periodic evaluations.",
    )
    final_prompts: PositiveInt = Field(256, description="Prompts of the final table, the same for all policies.")
    final_images_per_prompt: int = Field(2, ge=2, description="Images per prompt of the final table.")


class CheckpointConfig(Section):
    """Atomic checkpoints, from which a run resumes exactly."""

    every: PositiveInt = Field(50, description="Iterations between two checkpoints, in both stages.")
    keep: PositiveInt = Field(2, description="Newest checkpoints that are kept per stage.")
    best: str | None = Field(
        None,
        description="A reward, or diversity. Of each stage, the evaluated checkpoint with the highest mean of it is "
        "kept besides the newest ones. null: none.",
    )
    copy_to: str | None = Field(
        None,
        description="Folder or URL (s3://BUCKET/RUN, gs://BUCKET/RUN; extra `remote`) that gets a copy of every "
        "checkpoint, and of the run's results. With --resume, a run directory without the run is filled from there. "
        "null: none.",
    )

    @field_validator("copy_to")
    @classmethod
    def _url_has_no_secret(cls, url: str | None) -> str | None:
        if url is not None and ("@" in url.partition("://")[2].partition("/")[0] or not url.strip()):
            raise PydanticCustomError(
                "copy_to", "name a folder or s3://BUCKET/..., without a password: keys come from the environment"
            )
        return url


class MetricsConfig(Section):
    """Prometheus metrics of a run."""

    port: int | None = Field(
        0,
        ge=0,
        le=65_535,
        description="Port. 0: any free port, printed at the start. null: no metrics endpoint.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Metrics need no token: on any but loopback, everybody who reaches it reads "
        "them.",
    )
    targets: Path | None = Field(
        None,
        description="Folder in which the run keeps rtdmd_NAME.json, a file for Prometheus (file_sd_configs) with the "
        "addresses of the run and its reward servers. null: in logs/ of the run directory, or in a Ray cluster beside "
        "Ray's own such file.",
    )

    @field_validator("host")
    @classmethod
    def _host_is_a_host(cls, host: str) -> str:
        fault = host_fault(host)
        if fault:
            raise PydanticCustomError("host", "{fault}", {"fault": fault})
        return host


DASHBOARD_PORT = 8720
"""Port of the live page where it is asked for without a number."""


class DashboardConfig(Section):
    """The live page, and the groups that it shows. `--dashboard [PORT]` sets the port."""

    port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="Port of the live page. 0: any free port, printed at the start. null: no page.",
    )
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that the page listens on. Any but loopback needs RTDMD_DASHBOARD_TOKEN.",
    )
    groups: NonNegativeInt = Field(
        4,
        description="Groups that are kept to look at, of an iteration of stage 2 that keeps any. Each is a strip of "
        "pictures of at most 256 pixels: 10 to 40 KB per sample.",
    )
    groups_every: PositiveInt = Field(10, description="Iterations of stage 2 between two that keep groups.")


class Config(Section):
    """A whole run."""

    run: RunIdentity
    backbone: BackboneConfig
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    workers: WorkersConfig = WorkersConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    reward_client: RewardClientConfig = RewardClientConfig()
    redis: RedisConfig = RedisConfig()
    metrics: MetricsConfig = MetricsConfig()
    trackers: TrackersConfig = TrackersConfig()
    dashboard: DashboardConfig = DashboardConfig()

    @model_validator(mode="after")
    def _reward_names_differ(self) -> Self:
        repeated = [name for name, times in Counter(reward.name for reward in self.rewards).items() if times > 1]
        if repeated:
            raise problem("rewards", f"the name {repeated[0]!r} is used more than once: give each reward its own name")
        return self

    @model_validator(mode="after")
    def _rewards_possible(self) -> Self:
        check_rewards(self.rewards, self.reward_client, self.redis)
        check_watchdog(self.watchdog, self.rewards, self.evaluation.every, self.checkpoint.every)
        return self

    @model_validator(mode="after")
    def _best_checkpoint_is_known(self) -> Self:
        best, every = self.checkpoint.best, self.checkpoint.every
        known = [*(reward.name for reward in self.rewards), "diversity"]
        if best is not None and best not in known:
            raise problem("checkpoint.best", f"{best}, which no evaluation has: there are {', '.join(known)}")
        if best is not None and every % self.evaluation.every:
            raise problem(
                "checkpoint.best",
                f"{best}, but checkpoint.every = {every} is not a multiple of evaluation.every = "
                f"{self.evaluation.every}: a checkpoint must be evaluated to be the best",
            )
        return self

    @model_validator(mode="after")
    def _gpus_can_be_shared(self) -> Self:
        shared_gpus(self.learner, self.workers)
        return self

    @property
    def phases_share_gpus(self) -> bool:
        """Whether sampling and updates take turns on the same GPUs, so that each can have the other's memory."""
        return self.alignment.max_staleness == 0 and shared_gpus(self.learner, self.workers) is not None

    def _least_rows(self) -> dict[str, int]:
        """Smallest batch of each stage that runs. In stage 2 it is one group: an outage may drop all others."""
        cold_start, alignment, sizes = self.cold_start, self.alignment, {}
        if cold_start.iterations > 0 and cold_start.from_checkpoint is None:
            sizes["cold_start.batch_size"] = cold_start.batch_size
        if alignment.iterations > 0:
            sizes["alignment.group_size"] = math.ceil(alignment.train_fraction * alignment.group_size - 1e-9)
        return sizes

    @model_validator(mode="after")
    def _every_rank_has_work(self) -> Self:
        for key, rows in self._least_rows().items():
            if rows < self.learner.ranks:
                raise problem("learner.ranks", f"{self.learner.ranks}, more than {key} = {rows}: use fewer ranks")
        return self

    @model_validator(mode="after")
    def _base_can_be_sharded(self) -> Self:
        """Ranks that gather each other's weights must make the same passes."""
        ranks, cold_start, alignment = self.learner.ranks, self.cold_start, self.alignment
        if not self.learner.shard_base:
            return self
        if ranks == 1:
            raise problem("learner.shard_base", "true, with one rank: there is no other rank to share the weights with")
        if 0 < self.learner.num_gpus < 1:
            raise problem("learner.shard_base", "true, with a part of a GPU per rank: give each rank a whole one")
        for key, rows in self._least_rows().items():
            if rows % ranks:
                raise problem(key, f"{rows}, not a multiple of learner.ranks = {ranks}, as learner.shard_base needs")
        if max(cold_start.consistency_weight, alignment.consistency_weight) > 0 and cold_start.consistency_fraction < 1:
            raise problem(
                "cold_start.consistency_fraction",
                f"{cold_start.consistency_fraction:g}, which gives ranks unequal work: learner.shard_base needs 1",
            )
        if alignment.iterations > 0 and alignment.train_fraction < 1:
            raise problem(
                "alignment.train_fraction",
                f"{alignment.train_fraction:g}, which gives ranks unequal work: learner.shard_base needs 1",
            )
        if alignment.iterations > 0 and alignment.reward_gradient_weight > 0 and alignment.matching_weight == 0:
            raise problem(
                "alignment.matching_weight", "0: with learner.shard_base every rank must always have a gradient"
            )
        return self

    @model_validator(mode="after")
    def _cold_start_possible(self) -> Self:
        cold_start = self.cold_start
        if cold_start.objective == "clean" and cold_start.consistency_weight > 0:
            raise problem(
                "cold_start.consistency_weight",
                f'{cold_start.consistency_weight:g}, but with objective = "clean" (plain DMD) there is no noise to be '
                "consistent over: use 0",
            )
        return self

    @model_validator(mode="after")
    def _policy_names_differ(self) -> Self:
        if self.evaluation.teacher_steps == self.sampling.steps:
            raise problem(
                "evaluation.teacher_steps",
                f"{self.sampling.steps}, as many as sampling.steps: the final table has the teacher at both, by number",
            )
        return self

    @model_validator(mode="after")
    def _alignment_possible(self) -> Self:
        alignment = self.alignment
        if alignment.iterations == 0:
            return self
        if alignment.iterations < alignment.ema_every:
            raise problem(
                "alignment.iterations",
                f"{alignment.iterations}, fewer than alignment.ema_every = {alignment.ema_every}: the moving average, "
                "which is what a run evaluates and exports, would never move",
            )
        if alignment.policy_gradient != "none":
            self._check_policy_gradient()
        elif alignment.train_fraction < 1:
            raise problem(
                "alignment.train_fraction",
                f"{alignment.train_fraction:g}, with policy_gradient: none: samples would be chosen by advantages that "
                "nothing trains on: use 1",
            )
        trained = [reward for reward in self.rewards if reward.trained]
        uses_rewards = alignment.policy_gradient != "none" or alignment.reward_gradient_weight > 0
        if uses_rewards and not trained:
            raise problem("rewards", "no reward is trained on: every one is evaluation_only or has weight 0")
        if alignment.reward_gradient_weight > 0 and not any(reward.differentiable for reward in trained):
            raise problem(
                "alignment.reward_gradient_weight",
                f"{alignment.reward_gradient_weight:g}, but no trained reward is differentiable: use 0 or mark one",
            )
        if not uses_rewards and alignment.matching_weight == 0:
            raise problem("alignment.matching_weight", "0, with neither policy nor reward gradient: nothing trains")
        return self

    def _check_policy_gradient(self) -> None:
        if self.alignment.policy_gradient in ("nft", "surrogate_reward"):
            self._check_rival(self.alignment.policy_gradient)
        else:
            self._check_transition_policy()

    def _check_rival(self, rival: str) -> None:
        """Refuse what would have no effect, groups without differences, and a surrogate without its anchor."""
        alignment, steps = self.alignment, self.sampling.steps
        if rival == "surrogate_reward" and alignment.matching_weight == 0:
            raise problem(
                "alignment.matching_weight",
                "0: a student that climbs a learned reward needs matching as its anchor (policy_gradient: "
                "surrogate_reward)",
            )
        if alignment.selected_steps > steps:
            raise problem(
                "alignment.selected_steps", f"{alignment.selected_steps}, more than sampling.steps = {steps}: use fewer"
            )
        if self.sampling.eta == 0 and alignment.same_latent:
            raise problem("alignment.same_latent", "true, with sampling.eta = 0: all samples of a group are equal")
        for name, value, only in (
            ("step_weights", alignment.step_weights, "equal"),
            ("surrogate", alignment.surrogate, "squared_error"),
            ("old_surrogate", alignment.old_surrogate, "learner"),
        ):
            if value != only:
                raise problem(
                    f"alignment.{name}", f"{value}, but policy_gradient: {rival} has no transition density: use {only}"
                )

    def _check_transition_policy(self) -> None:
        if self.alignment.surrogate == "gaussian" and self.alignment.old_surrogate == "rollout":
            raise problem(
                "alignment.old_surrogate",
                'rollout, but workers compute the squared error alone: with surrogate = "gaussian" use learner',
            )
        stochastic = self.sampling.steps - 1
        if self.sampling.eta == 0:
            raise problem("sampling.eta", "0 makes every step deterministic: a policy gradient needs eta > 0")
        if self.alignment.policy_gradient == "subgrpo" and self.alignment.selected_steps > stochastic:
            raise problem(
                "alignment.selected_steps",
                f"{self.alignment.selected_steps} steps cannot be selected from the {stochastic} stochastic ones of "
                f"sampling.steps = {self.sampling.steps} (the last step is deterministic)",
            )
