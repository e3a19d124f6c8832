"""A world small enough to be solved on paper: a Gaussian teacher and a few-step generator with affine velocities.

A "latent" is [B, c, 1, 1]. Everything a network would have to learn is known here in closed form, so a test can say
where the project's own losses must come to rest, and by how much a reward must move them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.flow import Transition, cps_transition


def to_vector(latents_Bchw: Tensor) -> Tensor:
    return latents_Bchw[:, :, 0, 0]


def to_latent(vectors_Bc: Tensor) -> Tensor:
    return vectors_Bc[:, :, None, None]


def matrix_function(symmetric_cc: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to the eigenvalues of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(symmetric_cc)
    return vectors @ torch.diag(function(values)) @ vectors.T


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) at noise level `sigma`: of images when it is 0, else of their noisy states x_s."""

    mean_c: Tensor
    covariance_cc: Tensor
    sigma: float = 0.0

    def velocity(self, sample_Bchw: Tensor, level: Tensor) -> Tensor:
        """E[v* | x_t] at level t ([] or [B]), v* the ambient target: the regression of one Gaussian on another.

        With a = (1 - t) / (1 - s): x_t has mean a m and covariance a^2 S + (t^2 - a^2 s^2) I; v* has mean -m / (1 - s)
        and Cov(v*, x_t) = -a S / (1 - s) + (t + a s^2 / (1 - s)) I. At s = 0 this is E[eps - x0 | x_t].
        """
        identity_cc = torch.eye(self.mean_c.shape[-1], dtype=self.mean_c.dtype)
        level_B11, start = level.reshape(-1, 1, 1), self.sigma
        keep_B11 = (1 - level_B11) / (1 - start)
        variance_Bcc = keep_B11**2 * self.covariance_cc + (level_B11**2 - (keep_B11 * start) ** 2) * identity_cc
        noise_part_B11 = level_B11 + keep_B11 * start**2 / (1 - start)
        cross_Bcc = noise_part_B11 * identity_cc - keep_B11 / (1 - start) * self.covariance_cc
        centred_Bc1 = (to_vector(sample_Bchw) - keep_B11[:, 0] * self.mean_c).unsqueeze(-1)
        regression_Bc = (cross_Bcc @ torch.linalg.inv(variance_Bcc) @ centred_Bc1).squeeze(-1)
        return to_latent(regression_Bc - self.mean_c / (1 - start))

    def noisy(self, sigma: float) -> Gaussian:
        """The distribution of (1 - sigma) x0 + sigma eps."""
        identity_cc = torch.eye(len(self.mean_c), dtype=self.mean_c.dtype)
        covariance_cc = (1 - sigma) ** 2 * self.covariance_cc + sigma**2 * identity_cc
        return Gaussian((1 - sigma) * self.mean_c, covariance_cc, sigma)


@dataclass
class AffineGenerator:
    """A few-step CPS sampler whose velocity at step j is W_j x + b_j.

    One transition is then x' = M_j x - kappa_j b_j + std_j z, with kappa_j = (1 - s') s - s' cos(eta pi / 2) (1 - s)
    the weight of the velocity in the transition from s to s', and M_j = (1 - s' + s' cos(eta pi / 2)) I - kappa_j W_j.
    """

    sigmas: tuple[float, ...]
    eta: float
    weights_Tcc: Tensor
    biases_Tc: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def velocity(self, sample_Bchw: Tensor, step: int) -> Tensor:
        return to_latent(to_vector(sample_Bchw) @ self.weights_Tcc[step].T + self.biases_Tc[step])

    def transition(self, sample_Bchw: Tensor, step: int) -> Transition:
        velocity_Bchw = self.velocity(sample_Bchw, step)
        return cps_transition(sample_Bchw, velocity_Bchw, self.sigmas[step], self.sigmas[step + 1], self.eta)

    def velocity_weight(self, step: int) -> float:
        sigma, sigma_next = self.sigmas[step : step + 2]
        return (1 - sigma_next) * sigma - sigma_next * math.cos(self.eta * math.pi / 2) * (1 - sigma)

    def std(self, step: int) -> float:
        return self.sigmas[step + 1] * math.sin(self.eta * math.pi / 2)

    def linear_map(self, step: int) -> Tensor:
        kept = 1 - self.sigmas[step + 1] * (1 - math.cos(self.eta * math.pi / 2))
        identity_cc = torch.eye(self.biases_Tc.shape[1], dtype=self.biases_Tc.dtype)
        return kept * identity_cc - self.velocity_weight(step) * self.weights_Tcc[step]

    def state(self, steps: int) -> Gaussian:
        """The exact distribution after so many steps from standard normal noise."""
        dimension = self.biases_Tc.shape[1]
        identity_cc = torch.eye(dimension, dtype=self.biases_Tc.dtype)
        mean_c, covariance_cc = torch.zeros(dimension, dtype=self.biases_Tc.dtype), identity_cc
        for step in range(steps):
            linear_cc = self.linear_map(step).detach()
            mean_c = linear_cc @ mean_c - self.velocity_weight(step) * self.biases_Tc[step].detach()
            covariance_cc = linear_cc @ covariance_cc @ linear_cc.T + self.std(step) ** 2 * identity_cc
        return Gaussian(mean_c, covariance_cc, self.sigmas[steps])


def teachers_own_steps(teacher: Gaussian, sigmas: tuple[float, ...], eta: float) -> AffineGenerator:
    """The generator that uses the teacher's velocity at each level: what a student starts from."""
    weights, biases = [], []
    zero_Bchw = torch.zeros(1, len(teacher.mean_c), 1, 1, dtype=teacher.mean_c.dtype)
    units_Bchw = to_latent(torch.eye(len(teacher.mean_c), dtype=teacher.mean_c.dtype))
    for sigma in sigmas[:-1]:
        level_B = torch.full((len(units_Bchw),), sigma, dtype=teacher.mean_c.dtype)
        bias_Bchw = teacher.velocity(zero_Bchw, level_B[:1])
        weights.append(to_vector(teacher.velocity(units_Bchw, level_B) - bias_Bchw).T)
        biases.append(to_vector(bias_Bchw)[0])
    return AffineGenerator(sigmas, eta, torch.stack(weights), torch.stack(biases))


def exact_steps(teacher: Gaussian, sigmas: tuple[float, ...], eta: float) -> AffineGenerator:
    """The generator whose every state has exactly the teacher's distribution at that level.

    Step j must carry S = Cov(x_s) to S' - std^2 I, which the symmetric M_j = ((S' - std^2 I) S^-1)^(1/2) does; the
    factors commute, being functions of one covariance.
    """
    start = teachers_own_steps(teacher, sigmas, eta)
    identity_cc = torch.eye(len(teacher.mean_c), dtype=teacher.mean_c.dtype)
    for step in range(start.num_steps):
        now, then = teacher.noisy(sigmas[step]), teacher.noisy(sigmas[step + 1])
        carried_cc = then.covariance_cc - start.std(step) ** 2 * identity_cc
        linear_cc = matrix_function(carried_cc, torch.sqrt) @ matrix_function(now.covariance_cc, torch.rsqrt)
        weight = start.velocity_weight(step)
        kept = 1 - sigmas[step + 1] * (1 - math.cos(eta * math.pi / 2))
        start.weights_Tcc[step] = (kept * identity_cc - linear_cc) / weight
        start.biases_Tc[step] = (linear_cc @ now.mean_c - then.mean_c) / weight
    return start
