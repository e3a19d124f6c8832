"""One step of sampling: the only home of what samplers and trainers do with a model at a noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from common.flow import Transition, cps_transition
from common.types import Step

Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""latents [B, c, h, w] and noise levels [B] -> velocity [B, c, h, w]."""


def step_transition(model: Model, latents_Bchw: Tensor, step: Step) -> Transition:
    """The Gaussian from which a sampler draws its next state, with the graph of the model's velocity."""
    velocity_Bchw = model(latents_Bchw, torch.full((len(latents_Bchw),), step.sigma))
    return cps_transition(latents_Bchw, velocity_Bchw, step.sigma, step.sigma_next, step.eta)
