"""One step of sampling, shared by samplers and trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from common.flow import Transition, cps_transition
from common.types import Step

Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A model maps latents [B, c, h, w] and noise levels [B] to a velocity [B, c, h, w]."""


def step_transition(model: Model, latents_Bchw: Tensor, step: Step) -> Transition:
    """The Gaussian from which a sampler draws its next state, with the graph of the model's velocity."""
    sigma_B = torch.full((len(latents_Bchw),), step.sigma, device=latents_Bchw.device)
    velocity_Bchw = model(latents_Bchw, sigma_B)
    return cps_transition(latents_Bchw, velocity_Bchw, step.sigma, step.sigma_next, step.eta)
