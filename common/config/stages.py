"""Sections of a run file for the sampler and the two training stages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from common.config.section import Section

SURROGATE_GAP_LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}
"""The default of `alignment.surrogate_gap_limit` by the dtype of the backbone. Measured gaps: 1e-7 and below 1e-3."""


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
    policy_gradient: Literal["subgrpo", "grpo", "nft", "surrogate_reward", "none"] = Field(
        "subgrpo",
        description="How rewards train the student without a gradient of theirs. subgrpo: train selected steps; on the "
        "others the group shares its noise. grpo: train all stochastic steps. nft: DiffusionNFT, on renoised final "
        "samples. surrogate_reward: TDM-R1, an adapter learns the rewards and the student climbs what it has learned. "
        'none: no policy gradient. nft and surrogate_reward are for comparison (docs/method.md, "Rivals").',
    )
    selected_steps: PositiveInt = Field(
        2,
        description="Steps m trained per iteration: of the stochastic ones with subgrpo, of all with nft and "
        "surrogate_reward.",
    )
    same_latent: bool = Field(
        False, description="The samples of a group start from one initial noise. Published: each has its own."
    )
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the samples that both networks train on: those with the largest |advantage| of the "
        "batch. Below 1 an update is cheaper and loses the least of the policy gradient, but matching and fake score "
        "see these samples alone.",
    )
    step_weights: Literal["equal", "balanced"] = Field(
        "equal",
        description="Weights of the steps in the policy loss. equal: as published; the size of a step's gradient then "
        "depends on its noise level. balanced: divided by that size, with a mean of 1.",
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
    lora_rank: PositiveInt | None = Field(
        None,
        description="Rank of the fresh adapters, at the scale lora.alpha / lora.rank; null: lora.rank. A start from "
        "two stacked adapters of rank 32 has lora.rank 64; published stage 2 trains a rank of 32.",
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
        '(docs/method.md, "Signals"). One costs a backward pass more per sample. null: never. Not measured with '
        "learner.shard_base.",
    )
    surrogate_gap_limit: float | None = Field(
        None,
        gt=0,
        description="Largest surrogate_gap of samples of the present policy. Beyond it, workers and learner compute "
        "different things from the same weights, and the run stops. null: 1e-4 in float32, 1e-2 in bfloat16.",
    )
    max_staleness: NonNegativeInt = Field(
        0, description="Largest age of the samples' policy, in versions behind the learner. 0 is synchronous."
    )
    micro_batch: PositiveInt = Field(
        16,
        description="Samples per forward and backward pass. It bounds memory and changes results by float rounding "
        "only.",
    )

    def gap_limit(self, dtype: Literal["float32", "bfloat16"]) -> float:
        """`surrogate_gap_limit`, or its default in this dtype."""
        return SURROGATE_GAP_LIMITS[dtype] if self.surrogate_gap_limit is None else self.surrogate_gap_limit
