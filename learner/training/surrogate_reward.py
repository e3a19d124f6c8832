"""TDM-R1's learned surrogate reward (arXiv 2603.07700): a rival of SubGRPO in the same loop.

An adapter on the teacher's base learns which samples of a group are better, at one of the student's own states per
iteration. Then the student climbs that reward at states of its trajectories. Distribution matching at the final step
remains the anchor. Formulas: `learner/objectives/surrogate_reward.py`.

    order of an iteration      fake score, surrogate, student

A state x_s after step j is renoised to a level above s and above LOWEST_LEVEL. While learning, the samples of a group
share level and noise, so that these cancel in the comparison. Departures from the published training are listed in
docs/method.md, "Rivals".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Conditioning
from common.config.stages import AlignmentConfig
from common.flow import ambient_target, clean_prediction
from common.types import Network, StepPlan
from learner.objectives.surrogate_reward import (
    ascent_loss,
    denoising_errors,
    preference_log_odds,
    preference_loss,
    reference_penalty,
)
from learner.training.alignment_batch import Batch
from learner.training.batch_metrics import Totals
from learner.training.distribution_matching import DrawKey, Renoised, renoise_samples
from learner.training.networks import Networks

BETA = 10.0
"""Scale of the preference's log-odds; published for OCR and HPS (1 for GenEval and ImageReward)."""
REFERENCE_WEIGHT = 1e-3
"""Weight of the penalty that keeps the surrogate near the teacher, as published."""
LARGEST_DISTANCE = 0.05
"""Bound of the mean (v - v_ref)^2, as in the released configuration."""
LOWEST_LEVEL = 0.3
"""A state is renoised at least to this level; published for OCR (0.25 to 0.4 for others)."""

Part: TypeAlias = tuple[slice, float, DrawKey]
"""A micro-batch: its rows, its share of the whole batch, and the key of its draws."""


@dataclass(frozen=True)
class _Judged:
    """A micro-batch's renoised states, and what the frozen reference says about them."""

    renoised: Renoised
    conditioning: Conditioning
    reference_Bchw: Tensor
    scaled_target_Bchw: Tensor
    scale: Tensor

    def errors(self, velocity_Bchw: Tensor) -> Tensor:
        return denoising_errors(velocity_Bchw, self.scaled_target_Bchw, self.scale)


class SurrogateReward:
    """Learns the reward, and trains the student on it; see `PolicyTerm`. Stage 2 must have begun with a surrogate."""

    def __init__(self, networks: Networks, settings: AlignmentConfig, seed: int) -> None:
        self._networks = networks
        self._backbone = networks.backbone
        self._settings = settings
        self._seed = seed

    def learn(self, batch: Batch, parts: Sequence[Part], totals: Totals) -> None:
        """One step of the surrogate on the batch's groups.

        A group's log-odds need all its samples, which may be in several micro-batches and on several ranks. So the
        errors, and the distance from the reference, are measured first, without gradient.

        Raises:
            TrainingError, RankError: the gradient is not finite, or another rank failed; the surrogate is unchanged.
        """
        step = learned_step(self._seed, batch.plan)
        weight = (step + 1) / batch.plan.num_steps
        judged: list[_Judged] = []
        measured = self._networks.ranks.total_of(
            "the surrogate's groups", batch.groups + 1, lambda: self._measured(batch, step, parts, judged)
        )
        log_odds_P, too_far = measured[:-1], bool(measured[-1] > LARGEST_DISTANCE)
        optimizer = self._networks.surrogate_optimizer
        with optimizer.gathering():
            for (rows, share, _), seen in zip(parts, judged, strict=True):
                velocity = self._velocity(Network.SURROGATE_REWARD, seen)
                log_odds_B = log_odds_P[batch.group_of_B[rows]].to(velocity.device)
                errors = seen.errors(velocity), seen.errors(seen.reference_Bchw)
                preference = preference_loss(*errors, batch.advantages_B[rows], log_odds_B, too_far=too_far)
                penalty = reference_penalty(velocity, seen.reference_Bchw)
                (weight * share * (preference.value + REFERENCE_WEIGHT * penalty.value)).backward()
                totals.add({**preference.metrics, **penalty.metrics}, share)
        norm = optimizer.step(batch.plan.iteration)
        totals.add({"surrogate_gradient_norm": norm}, len(batch) / batch.total)

    def steps(self, plan: StepPlan) -> tuple[int, ...]:
        return seeding.trained_steps(self._seed, plan.iteration, plan.num_steps, self._settings.selected_steps)

    def loss(self, batch: Batch, step: int, rows: slice, key: DrawKey) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The ascent of the reward by the student's clean prediction in this step."""
        key = replace(key, purpose=f"{key.purpose}/surrogate{step}")
        with torch.no_grad():
            judged = self._judged(batch, step, rows, key)
            surrogate = self._velocity(Network.SURROGATE_REWARD, judged)
            latents, level = judged.renoised.latents_Bchw, judged.renoised.sigma_B
            clean = [clean_prediction(latents, v, level) for v in (surrogate, judged.reference_Bchw)]
        loss = ascent_loss(batch.clean_prediction(self._backbone, step, rows), *clean)
        return loss.value, loss.metrics

    @torch.no_grad()
    def _measured(self, batch: Batch, step: int, parts: Sequence[Part], judged: list[_Judged]) -> Tensor:
        """This rank's part of every group's log-odds and of the distance, [P + 1] on the host.

        Fills `judged` with its micro-batches.
        """
        log_odds_P, distance = torch.zeros(batch.groups), torch.zeros(())
        for rows, share, key in parts:
            groups_B = batch.group_of_B[rows]
            seen = self._judged(batch, step, rows, replace(key, rows=groups_B.tolist()))
            judged.append(seen)
            velocity = self._velocity(Network.SURROGATE_REWARD, seen)
            distance += share * reference_penalty(velocity, seen.reference_Bchw).value.cpu()
            errors = [seen.errors(v) for v in (velocity, seen.reference_Bchw)]
            log_odds_P += preference_log_odds(
                errors[0].cpu(),
                errors[1].cpu(),
                batch.advantages_B[rows].cpu(),
                groups_B,
                batch.groups,
                BETA / self._settings.group_size,
            )
        return torch.cat([log_odds_P, distance[None]])

    def _judged(self, batch: Batch, step: int, rows: slice, key: DrawKey) -> _Judged:
        """The states after a step, renoised by this key."""
        conditioning, start = batch.conditioning(rows), batch.plan.steps[step].sigma_next
        renoised = renoise_samples(batch.latents(step + 1, rows), start, key, LOWEST_LEVEL)
        target, scale = ambient_target(renoised.x_start_Bchw, renoised.noise_Bchw, start, renoised.sigma_B)
        reference = self._backbone.velocity(Network.TEACHER, renoised.latents_Bchw, renoised.sigma_B, conditioning)
        return _Judged(renoised, conditioning, reference, target, scale)

    def _velocity(self, network: Network, judged: _Judged) -> Tensor:
        renoised = judged.renoised
        return self._backbone.velocity(network, renoised.latents_Bchw, renoised.sigma_B, judged.conditioning)


def learned_step(seed: int, plan: StepPlan) -> int:
    """The step whose states the surrogate learns on in this iteration: j with a probability in proportion to j + 1.

    Later states say more about the final sample.
    """
    odds = torch.arange(1, plan.num_steps + 1, dtype=torch.float64)
    drawn = seeding.uniform((), seed=seed, purpose="surrogate_step", iteration=plan.iteration)
    return int((drawn >= odds.cumsum(0) / odds.sum()).sum())
