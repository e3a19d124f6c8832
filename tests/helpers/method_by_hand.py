"""The method's losses on the Gaussian world, written out once more: float64, and no formula of the project's.

Only the draws are the project's (`common.seeding`), by the names under which the trainers ask for them. Latents are
[B, N, c], N pixels a sample; levels are [B, 1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import seeding
from common.types import Network
from tests.helpers.gaussian_backbone import DIRECTION, ETA, FACTOR, SIGMAS, TEACHER, GaussianBackbone
from tests.helpers.gaussian_world import AffineGenerator, Gaussian

COSINE, SINE = math.cos(ETA * math.pi / 2), math.sin(ETA * math.pi / 2)


def pixels(latents_Bchw: Tensor) -> Tensor:
    return latents_Bchw.double().flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Draws:
    """The draws of one update, by name; sample b of the batch has its own."""

    seed: int
    purpose: str
    iteration: int
    batch: int
    shape_chw: tuple[int, int, int]

    def normal(self, what: str) -> Tensor:
        rows = [
            seeding.normal(self.shape_chw, purpose=f"{self.purpose}/{what}", **self._keys(b)) for b in range(self.batch)
        ]
        return pixels(torch.stack(rows))

    def uniform(self, what: str) -> Tensor:
        rows = [seeding.uniform((), purpose=f"{self.purpose}/{what}", **self._keys(b)) for b in range(self.batch)]
        return torch.stack(rows).double().view(-1, 1, 1)

    def _keys(self, sample: int) -> dict[str, int]:
        return {"seed": self.seed, "iteration": self.iteration, "sample": sample}


@dataclass(frozen=True)
class FakeScore:
    """The fake score's deltas as leaves: mean_Tc and factor_Tcc, one for each interval between the levels."""

    mean_Tc: Tensor
    factor_Tcc: Tensor

    @classmethod
    def of(cls, backbone: GaussianBackbone) -> FakeScore:
        """The fake score as it is now."""
        totals = (backbone.adapters.total(Network.FAKE_SCORE, key) for key in ("mean", "factor"))
        return cls(*(total.detach().double().requires_grad_() for total in totals))

    def gradients(self) -> dict[str, Tensor]:
        return {"mean": self.mean_Tc.grad, "factor": self.factor_Tcc.grad}

    def velocity(self, x_BNc: Tensor, level_B11: Tensor, strengths: Sequence[float]) -> Tensor:
        rows = []
        for x_Nc, level, strength in zip(x_BNc, level_B11.flatten(), strengths, strict=True):
            interval = sum(float(level) > edge for edge in SIGMAS[1:-1])
            factor_cc = FACTOR + self.factor_Tcc[interval]
            mean_c = TEACHER.mean_c + strength * DIRECTION + self.mean_Tc[interval]
            rows.append(of_pixels(Gaussian(mean_c, factor_cc @ factor_cc.T), x_Nc, level))
        return torch.stack(rows)


def of_pixels(gaussian: Gaussian, x_Nc: Tensor, level: Tensor) -> Tensor:
    return gaussian.velocity(x_Nc[:, :, None, None], level)[:, :, 0, 0]


def teacher_velocity(x_BNc: Tensor, level_B11: Tensor, strengths: Sequence[float], guidance: float) -> Tensor:
    """v(empty) + c (v(prompt) - v(empty))."""
    rows = []
    for x_Nc, level, strength in zip(x_BNc, level_B11.flatten(), strengths, strict=True):
        prompted = Gaussian(TEACHER.mean_c + strength * DIRECTION, TEACHER.covariance_cc)
        empty, full = of_pixels(TEACHER, x_Nc, level), of_pixels(prompted, x_Nc, level)
        rows.append(empty + guidance * (full - empty))
    return torch.stack(rows)


def transition(x: Tensor, v: Tensor, level: Tensor | float, lower: Tensor | float, noise: Tensor) -> Tensor:
    """Coefficient-preserving sampling from a level down to a lower one."""
    clean, eps = x - level * v, x + (1 - level) * v
    return (1 - lower) * clean + lower * COSINE * eps + lower * SINE * noise


def roll(students: Sequence[AffineGenerator], draws: Draws, last_step: int) -> list[Tensor]:
    """The student's states before step 0 up to after `last_step`, one generator for each sample."""
    states = [draws.normal("initial")]
    for step in range(last_step + 1):
        v = torch.stack(
            [
                x @ student.weights_Tcc[step].T + student.biases_Tc[step]
                for student, x in zip(students, states[-1], strict=True)
            ]
        )
        states.append(transition(states[-1], v, SIGMAS[step], SIGMAS[step + 1], draws.normal(f"step{step}")))
    return states


@dataclass(frozen=True)
class Renoised:
    """x_t = a x_s + w z, and what it was made of."""

    start: float
    level: Tensor
    keep: Tensor
    width: Tensor
    noise: Tensor
    latents: Tensor


def renoised(x_s: Tensor, start: float, draws: Draws) -> Renoised:
    lowest = start + 0.01
    level = (lowest + (1 - lowest) * draws.uniform("level")).clamp(0.02, 0.98)
    keep = (1 - level) / (1 - start)
    width = (level**2 - keep**2 * start**2).sqrt()
    noise = draws.normal("renoise")
    return Renoised(start, level, keep, width, noise, keep * x_s + width * noise)


def fake_score_loss(
    fake: FakeScore,
    x_s: Tensor,
    start: float,
    strengths: Sequence[float],
    draws: Draws,
    consistency_weight: float,
) -> Tensor:
    """mean( min(1/w^2, 10) (w v - w v*)^2 ) + weight mean( (h_1 - h) (h_2 - h) )."""
    at = renoised(x_s, start, draws)
    t, s = at.level, start
    v = fake.velocity(at.latents, t, strengths)
    target = -x_s / (1 - s) + at.noise * (t + (1 - t) * s**2 / (1 - s) ** 2) / at.width
    weight = torch.minimum(1 / at.width**2, torch.tensor(10.0))
    denoising = (weight * (at.width * v - at.width * target) ** 2).mean()
    earlier = (t - (1 + (200 * draws.uniform("earlier")).floor()) / 1000).clamp(min=0)
    anchor, deviations = at.latents - t * v, []
    for name in ("first", "second"):
        x = transition(at.latents, v.detach(), t, earlier, draws.normal(name))
        deviations.append(x - earlier * fake.velocity(x, earlier, strengths) - anchor)
    return denoising + consistency_weight * (deviations[0] * deviations[1]).mean()


def matching_direction(
    fake: FakeScore, x_s: Tensor, start: float, strengths: Sequence[float], draws: Draws, guidance: float
) -> Tensor:
    """g of every sample, [B, N, c]: (x^fake - x^teacher) / mean |x - x^teacher|."""
    at = renoised(x_s, start, draws)
    noise = draws.normal("project")
    velocities = (
        fake.velocity(at.latents, at.level, strengths),
        teacher_velocity(at.latents, at.level, strengths, guidance),
    )
    from_fake, from_teacher = (transition(at.latents, v, at.level, start, noise) for v in velocities)
    return (from_fake - from_teacher) / (x_s - from_teacher).abs().mean(dim=(1, 2), keepdim=True)


def velocity_weight(step: int) -> float:
    """kappa: how much of the step's velocity its mean loses."""
    sigma, lower = SIGMAS[step : step + 2]
    return sigma * (1 - lower) - lower * COSINE * (1 - sigma)


def student_gradient(force: Tensor, states: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """From the loss's gradient in the mean of a step to that in W and b: zero for all other steps."""
    weight_Tcc = torch.zeros(len(SIGMAS) - 1, force.shape[-1], force.shape[-1], dtype=torch.float64)
    bias_Tc = torch.zeros(len(SIGMAS) - 1, force.shape[-1], dtype=torch.float64)
    weight_Tcc[step] = -velocity_weight(step) * torch.einsum("bni,bnj->ij", force, states[step])
    bias_Tc[step] = -velocity_weight(step) * force.sum(dim=(0, 1))
    return {"weight": weight_Tcc, "bias": bias_Tc}


def advantages(
    rewards_PG: Mapping[str, np.ndarray], weights: Mapping[str, float], floor: float = 1e-4, clip: float = 5.0
) -> np.ndarray:
    """Each reward less its group's mean, over its deviation in the batch; their weighted sum, over its own."""
    total_PG = sum(
        weight * (rewards_PG[name] - rewards_PG[name].mean(axis=1, keepdims=True)) / (rewards_PG[name].std() + floor)
        for name, weight in weights.items()
    )
    return np.clip(total_PG / (total_PG.std() + floor), -clip, clip)


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal up to float32."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        size = value.abs().max().item()
        assert size > 0
        assert (actual[key] - value).abs().max().item() < 1e-4 * size, key
