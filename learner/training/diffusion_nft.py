"""DiffusionNFT (arXiv 2509.16117) for a few-step student: a rival of SubGRPO in the same loop.

The published method needs only clean samples and their rewards. Each sample is noised anew to levels of the student's
own schedule, since a few-step student is defined nowhere else. Formulas: `learner/objectives/diffusion_nft.py`.

The old velocity is the student's own before the update, without gradient: the policy that sampled, unless
alignment.max_staleness is above 0. An iteration is one optimizer step, so the strength beta of the implicit velocities
has no effect (see the objective). Departures from the published training are listed in docs/method.md, "Rivals".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Backbone
from common.config.stages import AlignmentConfig
from common.flow import add_noise
from common.types import Network, StepPlan
from learner.objectives.diffusion_nft import nft_loss
from learner.training.alignment_batch import Batch
from learner.training.distribution_matching import DrawKey

BETA = 1.0
"""Published (0.1 for OCR). With one optimizer step per batch every value gives the same gradient."""


class DiffusionNft:
    """Trains the student by the forward process of its own samples; see `PolicyTerm`."""

    def __init__(self, backbone: Backbone, settings: AlignmentConfig, seed: int) -> None:
        self._backbone = backbone
        self._settings = settings
        self._seed = seed

    def steps(self, plan: StepPlan) -> tuple[int, ...]:
        return seeding.trained_steps(self._seed, plan.iteration, plan.num_steps, self._settings.selected_steps)

    def loss(self, batch: Batch, step: int, rows: slice, key: DrawKey) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The loss at the level at which this step starts."""
        clean, sigma = batch.latents(-1, rows), batch.plan.steps[step].sigma
        noised = add_noise(clean, key.normal(f"forward{step}", clean), sigma)
        sigma_B = torch.full((len(clean),), sigma, device=clean.device)
        velocity = self._backbone.velocity(Network.STUDENT, noised, sigma_B, batch.conditioning(rows))
        loss = nft_loss(
            clean,
            noised,
            sigma,
            velocity,
            velocity.detach(),
            batch.advantages_B[rows],
            self._settings.advantage_clip,
            BETA,
        )
        return loss.value, loss.metrics
