"""The schema of a run file. Every option is one field, with its unit, its reason and a vetted default.

Defaults are the published SD3-M setting of RTDMD (arXiv 2605.26108). Where the paper's text and its released
configuration differ, the configuration counts. A run file (deploy/runs/*.yaml) overrides what its model needs.
Every section is frozen and refuses unknown keys. `learner.preflight.run_file` reads files and overrides.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from common.config.backbones import BackboneConfig
from common.config.rewards import RedisConfig, RewardClientConfig, RewardConfig, check_rewards
from common.config.section import Section, problem


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


class SamplingConfig(Section):
    """The few-step sampler (coefficient-preserving sampling, arXiv 2509.05952)."""

    steps: int = Field(4, ge=2, description="Steps T of the student. The last one is deterministic.")
    eta: float = Field(
        0.9, ge=0, le=1, description="Stochasticity of a step. 0 is an Euler step, 1 renoises the clean prediction."
    )


class ColdStartConfig(Section):
    """Stage 1: AC-DMD, distilling the teacher into the few-step student."""

    objective: Literal["ambient", "clean"] = Field(
        "ambient",
        description="Samples that fake score and student train on. ambient: the sample after a random step, which may "
        "still be noisy (AC-DMD). clean: the clean prediction at that step (plain DMD, for comparison); it needs "
        "consistency_weight: 0.",
    )
    iterations: NonNegativeInt = Field(
        15_000, description="Iterations, each with one fake-score update. 0 starts alignment from the teacher."
    )
    batch_size: PositiveInt = Field(72, description="Samples per iteration (published: 9 on each of 8 GPUs).")
    student_every: PositiveInt = Field(10, description="Fake-score updates per student update.")
    learning_rate_student: NonNegativeFloat = Field(3e-5, description="AdamW learning rate of the student.")
    learning_rate_fake: NonNegativeFloat = Field(3e-5, description="AdamW learning rate of the fake score.")
    learning_rate_schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: both learning rates fall to zero over the iterations of the stage."
    )
    weight_decay_student: NonNegativeFloat = Field(0.0, description="AdamW weight decay of the student.")
    weight_decay_fake: NonNegativeFloat = Field(0.0, description="AdamW weight decay of the fake score.")
    gradient_clip_student: float = Field(1.0, gt=0, description="Largest gradient norm of the student.")
    gradient_clip_fake: float = Field(
        1.0,
        gt=0,
        description="Largest gradient norm of the fake score. It bounds the spikes of the loss at high noise.",
    )
    lora_init_std: float | None = Field(
        None, gt=0, description="Standard deviation of the fresh adapters' A (B is zero); null: 1 / lora.rank."
    )
    ema_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay of the student's moving average per iteration. It is applied in every iteration, also in "
        "those that do not train the student.",
    )
    consistency_weight: NonNegativeFloat = Field(
        0.01, description="Weight of the fake score's two-sample consistency regulariser in this stage."
    )
    consistency_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the samples on which the consistency regulariser is estimated, spread evenly over "
        "the batch, in both stages. On all samples it costs twice as much as the fake loss.",
    )
    fake_max_weight: float = Field(
        10.0,
        gt=0,
        description="Largest weight 1/w^2 of the fake loss, in both stages. w vanishes near the start of the "
        "sub-interval.",
    )
    from_checkpoint: Path | None = Field(
        None,
        description="Checkpoint directory of another run's cold start. This run starts from it and skips the stage.",
    )


class AlignmentConfig(Section):
    """Stage 2: RTDMD. Rewards by SubGRPO and back-propagation, with the teacher's distribution as the anchor."""

    iterations: NonNegativeInt = Field(1_000, description="Iterations. Each is one update of student and fake score.")
    prompts_per_iteration: PositiveInt = Field(
        32, description="Prompts P per iteration, each with one group of samples."
    )
    group_size: int = Field(
        16, ge=2, description="Samples G per prompt. An advantage compares a sample with its group."
    )
    policy_gradient: Literal["subgrpo", "grpo", "none"] = Field(
        "subgrpo",
        description="subgrpo: train selected steps; on the others the group shares its noise. grpo: train all "
        "stochastic steps. none: no policy gradient.",
    )
    selected_steps: PositiveInt = Field(2, description="Stochastic steps m that subgrpo trains per iteration.")
    same_latent: bool = Field(
        False, description="The samples of a group start from one initial noise. Published: each has its own."
    )
    shuffled_advantages: bool = Field(
        False,
        description="Shuffle the advantages within each group: a control for experiments, whose policy gradient is "
        "noise alone.",
    )
    clip_low: float = Field(
        1e-5, gt=0, lt=1, description="Width of the ratio's clip below 1. It is tiny because the surrogate is a mean."
    )
    clip_high: float = Field(1e-5, gt=0, lt=1, description="Width of the ratio's clip above 1.")
    old_surrogate: Literal["learner", "rollout"] = Field(
        "learner",
        description="Process that evaluates the old surrogate. learner: rounding in the sampler has no effect, but "
        "the ratio is 1 even on stale samples (max_staleness > 0). rollout: the ratio corrects for staleness.",
    )
    surrogate: Literal["squared_error", "gaussian"] = Field(
        "squared_error",
        description="Log-density of a transition. squared_error: the published surrogate. gaussian: the exact density; "
        "it needs old_surrogate: learner.",
    )
    advantage_scale: Literal["batch", "group"] = Field(
        "batch", description="Standard deviation that divides a reward: of the whole batch, or of the group."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Largest absolute advantage. Larger ones are clipped.")
    matching_weight: NonNegativeFloat = Field(
        1e-3, description="Weight of the AC-DMD student loss at the final step. It limits reward hacking."
    )
    reward_gradient_weight: NonNegativeFloat = Field(
        1e-4, description="Weight of the rewards that are back-propagated through the final step."
    )
    reward_gradient_clip: float | None = Field(
        None,
        gt=0,
        description="Largest norm of one sample's gradient of the rewards with respect to its latents. A few broken "
        "images have gradients many times larger than the others. null: no clip, as published.",
    )
    reward_target: float = Field(
        3.0, description="Weighted sum of the differentiable rewards at which back-propagation of a sample stops."
    )
    learning_rate_student: NonNegativeFloat = Field(3e-6, description="AdamW learning rate of the student.")
    learning_rate_fake: NonNegativeFloat = Field(3e-5, description="AdamW learning rate of the fake score.")
    learning_rate_schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: both learning rates fall to zero over the iterations of the stage."
    )
    weight_decay_student: NonNegativeFloat = Field(1e-4, description="AdamW weight decay of the student.")
    weight_decay_fake: NonNegativeFloat = Field(0.0, description="AdamW weight decay of the fake score.")
    gradient_clip_student: float = Field(1.0, gt=0, description="Largest gradient norm of the student.")
    gradient_clip_fake: float = Field(1.0, gt=0, description="Largest gradient norm of the fake score.")
    consistency_weight: NonNegativeFloat = Field(
        0.01, description="Weight of the fake score's consistency regulariser in this stage."
    )
    lora_init_std: float | None = Field(
        1.0,
        gt=0,
        description="Standard deviation of the fresh adapters' A (B is zero); null: 1 / lora.rank. AdamW moves B by "
        "the learning rate whatever its gradient, so a learning rate belongs to one value of this.",
    )
    ema_decay: float = Field(
        0.185,
        ge=0,
        lt=1,
        description="Decay of the student's moving average per update. Published: 0.9, applied once per micro-batch "
        "of 16 in an iteration; 0.9^16 = 0.185.",
    )
    ema_every: PositiveInt = Field(8, description="Iterations between two updates of the moving average.")
    signal_every: PositiveInt | None = Field(
        20,
        description="Iterations between two measurements of what each term contributes to the student's gradient "
        '(docs/method.md, "Signals"). One costs a backward pass more per sample. null: never.',
    )
    max_staleness: NonNegativeInt = Field(
        0, description="Largest age of the samples' policy, in versions behind the learner. 0 is synchronous."
    )
    micro_batch: PositiveInt = Field(
        16,
        description="Samples per forward and backward pass. It bounds memory and changes results by float rounding "
        "only.",
    )


class WorkersConfig(Section):
    """Rollout workers (Ray actors)."""

    count: PositiveInt = Field(
        1, description="Number of rollout workers. Neither the number nor the placement changes the samples of a run."
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker.")
    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs that Ray reserves per worker.")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves per worker.")
    compiled: bool = Field(
        False, description="Compile the transformer's blocks. The start is slower, and workers may differ by rounding."
    )
    restarts: NonNegativeInt = Field(3, description="Restarts of each dead worker before the run stops.")


class LearnerConfig(Section):
    """The learner: one Ray actor per rank. Ray places it on a machine with the resources below."""

    ranks: PositiveInt = Field(
        1,
        description="Processes that share every update, each with a part of the batch. Results differ by float "
        "rounding only.",
    )
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads per rank. null: 1 on GPUs, else the fastest number, timed for two seconds at the "
        "start. It changes results by float rounding; config.yaml records it, and a resumed run keeps it.",
    )
    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs that Ray reserves per rank.")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves per rank.")
    shard_base: bool = Field(
        False, description="Shard the frozen weights over the ranks (FSDP2), for models that do not fit one GPU."
    )


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
    final_prompts: PositiveInt = Field(256, description="Prompts of the final table, the same for all policies.")
    final_images_per_prompt: int = Field(2, ge=2, description="Images per prompt of the final table.")


class CheckpointConfig(Section):
    """Atomic checkpoints, from which a run resumes exactly."""

    every: PositiveInt = Field(50, description="Iterations between two checkpoints, in both stages.")
    keep: PositiveInt = Field(2, description="Newest checkpoints that are kept per stage.")


class MetricsConfig(Section):
    """Prometheus metrics of the driver."""

    port: int | None = Field(
        0,
        ge=0,
        le=65_535,
        description="Port on loopback. 0: any free port, printed at the start. null: no metrics endpoint.",
    )


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
    reward_client: RewardClientConfig = RewardClientConfig()
    redis: RedisConfig = RedisConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _reward_names_differ(self) -> Self:
        repeated = [name for name, times in Counter(reward.name for reward in self.rewards).items() if times > 1]
        if repeated:
            raise problem("rewards", f"the name {repeated[0]!r} is used more than once: give each reward its own name")
        return self

    @model_validator(mode="after")
    def _rewards_possible(self) -> Self:
        check_rewards(self.rewards, self.reward_client, self.redis)
        return self

    def _least_rows(self) -> dict[str, int]:
        """Smallest batch of each stage that runs. In stage 2 it is one group: an outage may drop all others."""
        cold_start, alignment, sizes = self.cold_start, self.alignment, {}
        if cold_start.iterations > 0 and cold_start.from_checkpoint is None:
            sizes["cold_start.batch_size"] = cold_start.batch_size
        if alignment.iterations > 0:
            sizes["alignment.group_size"] = alignment.group_size
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
