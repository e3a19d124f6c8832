"""The policy gradient of one step of the rollout: SubGRPO on the steps that the plan selects, GRPO on all of them.

`PolicyTerm` is the interface of every way in which rewards without a gradient train the student. Its rivals are in
`diffusion_nft.py` and `surrogate_reward.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

from common.backbones.base import Backbone
from common.config.stages import AlignmentConfig
from common.flow import gaussian_log_density, surrogate_log_density, velocity_coefficient
from common.types import StepPlan
from learner.metric_names import SURROGATE_GAP
from learner.objectives.subgrpo import subgrpo_loss
from learner.training.alignment_batch import Batch
from learner.training.distribution_matching import DrawKey


class PolicyTerm(Protocol):
    """The term of the student's loss that needs no gradient of a reward."""

    def steps(self, plan: StepPlan) -> tuple[int, ...]:
        """The steps of the rollout that this term trains in this iteration, the same on every rank."""
        ...

    def loss(self, batch: Batch, step: int, rows: slice, key: DrawKey) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The loss of these rows at one of these steps with its graph, and its metrics."""
        ...


class TransitionPolicy:
    """SubGRPO and GRPO: the density of the rollout's own transitions. Without a policy gradient it has no steps."""

    def __init__(self, backbone: Backbone, settings: AlignmentConfig) -> None:
        self._backbone = backbone
        self._settings = settings

    def steps(self, plan: StepPlan) -> tuple[int, ...]:
        return () if self._settings.policy_gradient == "none" else plan.selected

    def loss(
        self,
        batch: Batch,
        step: int,
        rows: slice,
        key: DrawKey,  # noqa: ARG002
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return policy_loss(self._backbone, self._settings, batch, step, rows)


def policy_loss(
    backbone: Backbone, settings: AlignmentConfig, batch: Batch, step: int, rows: slice
) -> tuple[Tensor, Mapping[str, float | Tensor]]:
    """The loss on one stochastic step, whose mean is recomputed with its graph, and its metrics."""
    transition = batch.transition(backbone, step, rows)
    next_sample = batch.latents(step + 1, rows)
    surrogate_B = surrogate_log_density(transition.mean_Bchw, next_sample)
    rollout_B = batch.old_surrogate_TB[step, rows]
    gap = (surrogate_B.detach() - rollout_B).abs().max()
    if settings.surrogate == "gaussian":
        surrogate_B = gaussian_log_density(transition.mean_Bchw, transition.std, next_sample)
    old_B = rollout_B if settings.old_surrogate == "rollout" else surrogate_B.detach()
    loss = subgrpo_loss(surrogate_B, old_B, batch.advantages_B[rows], settings.clip_low, settings.clip_high)
    weight = 1.0 if settings.step_weights == "equal" else balanced_weight(batch.plan, step, settings.surrogate)
    return weight * loss.value, {**loss.metrics, SURROGATE_GAP: gap}


def balanced_weight(plan: StepPlan, step: int, surrogate: Literal["squared_error", "gaussian"]) -> float:
    """The weight with which every step's gradient has the same size; the mean over the stochastic steps is 1.

    With kappa the velocity's coefficient in the transition's mean and z the noise, the gradient with respect to the
    velocity is 2 A kappa std z for the squared error, and A kappa z / std for the Gaussian density.
    """
    inverse_sizes = []
    for one in plan.steps[:-1]:
        std = one.sigma_next * math.sin(one.eta * math.pi / 2)
        size = abs(velocity_coefficient(one.sigma, one.sigma_next, one.eta))
        inverse_sizes.append(1 / (size * std if surrogate == "squared_error" else size / std))
    return inverse_sizes[step] / statistics.fmean(inverse_sizes)
