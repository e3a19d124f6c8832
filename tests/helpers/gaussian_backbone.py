"""A backbone whose three networks are known in closed form; the trainers run on it as on any other.

A latent [c, h, w] is h w independent vectors, its pixels. A prompt is a number, its strength u; the empty prompt has
strength 0. With pixels from N(m + u d, C), L L^T = C, and v(x, t; m, C) the exact velocity of N(m, C),

    teacher      v(x, t; m + u d, C)
    student      v(x, s_j; m + u d, C) + W_j x + b_j                at the level s_j of its step j
    fake score   v(x, t; m + u d + n_k, (L + F_k)(L + F_k)^T)       in the interval k between the student's levels
    surrogate    the same, with deltas of its own

W, b, n and F are sums over a stack of adapters, all zero at the start. A velocity is affine in the mean, so the teacher
under guidance c is the teacher of mean m + c u d: guidance moves the mean and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from common.backbones.base import Conditioning
from common.backbones.flat_adapter import FlatAdapter
from common.types import Guidance, Network
from tests.helpers.gaussian_world import AffineGenerator, Gaussian, teachers_own_steps

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
STEPS = len(SIGMAS) - 1
ETA = 0.9
EDGES = torch.tensor(sorted(SIGMAS[1:-1]))
"""Of the fake score's intervals."""
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.4, 0.6]], dtype=torch.float64)
TEACHER = Gaussian(torch.tensor([0.4, -0.5, 0.8], dtype=torch.float64), FACTOR @ FACTOR.T)
DIRECTION = torch.tensor([0.3, 0.2, -0.4], dtype=torch.float64)
"""d: what a prompt of strength 1 adds to the mean."""
CHANNELS = len(DIRECTION)
STUDENT_SHAPES = {"weight": (STEPS, CHANNELS, CHANNELS), "bias": (STEPS, CHANNELS)}
FAKE_SHAPES = {"mean": (STEPS, CHANNELS), "factor": (STEPS, CHANNELS, CHANNELS)}


class GaussianAdapters:
    """Stands for `AdapterBank`: an adapter is a named set of deltas, and a network the sum of its stack.

    Attributes:
        widths: what `add` was told of each adapter's initial standard deviation; these deltas begin at zero.
    """

    def __init__(self) -> None:
        self._adapters: dict[str, FlatAdapter] = {}
        self._networks: dict[str, tuple[str, ...]] = {}
        self.widths: dict[str, float | None] = {}

    def add(
        self,
        name: str,
        *,
        seed: int,
        trainable: bool,
        network: str = "student",
        init_std: float | None = None,
        rank: int | None = None,
    ) -> None:
        assert rank is None, "these adapters have no rank"
        shapes = STUDENT_SHAPES if network == Network.STUDENT else FAKE_SHAPES
        self._adapters[name] = FlatAdapter(name, shapes, trainable=trainable)
        self.widths[name] = init_std

    def freeze(self, name: str) -> None:
        self._adapters[name].freeze()

    def share_base(self, network: str, other: str) -> None:
        """All networks are of one kind here."""

    def define(self, network: str, stack: Sequence[str]) -> None:
        self._networks[network] = tuple(stack)

    def stack(self, network: str) -> tuple[str, ...]:
        return self._networks[network]

    def adapter(self, name: str) -> FlatAdapter:
        return self._adapters[name]

    def parameters(self, name: str) -> dict[str, Parameter]:
        return self._adapters[name].parameters

    def state(self, name: str) -> dict[str, Tensor]:
        return self._adapters[name].state()

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        self._adapters[name].load(state)

    def total(self, network: str, key: str) -> Tensor:
        """The sum of one parameter over a network's stack, with its graph."""
        return torch.stack([self._adapters[name].parameters[key] for name in self._networks[network]]).sum(dim=0)


class GaussianBackbone:
    """The part of the `Backbone` protocol that training uses."""

    def __init__(self, side: int) -> None:
        self.latent_shape = (CHANNELS, side, side)
        self.device, self.guidance = torch.device("cpu"), Guidance.CLASSIFIER_FREE
        self.adapters = GaussianAdapters()
        self._mean_c, self._covariance_cc = TEACHER.mean_c.float(), TEACHER.covariance_cc.float()

    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning({"strength_B": torch.tensor([float(text or 0) for text in texts])})

    def velocity(
        self,
        network: Network,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float | None = None,
    ) -> Tensor:
        mean_Bc = self._mean_c + conditioning.tensors["strength_B"][:, None] * DIRECTION.float()
        if network is Network.TEACHER:
            return gaussian_velocity(mean_Bc, self._covariance_cc.expand(len(mean_Bc), -1, -1), latents_Bchw, sigma_B)
        if network is Network.STUDENT:
            step_B = (sigma_B[:, None] - torch.tensor(SIGMAS[:-1])).abs().argmin(dim=1)
            covariance_Bcc = self._covariance_cc.expand(len(mean_Bc), -1, -1)
            base_Bchw = gaussian_velocity(mean_Bc, covariance_Bcc, latents_Bchw, sigma_B)
            weight_Bcc, bias_Bc = self._deltas(network, "weight", step_B), self._deltas(network, "bias", step_B)
            return base_Bchw + linear(weight_Bcc, latents_Bchw) + bias_Bc[:, :, None, None]
        interval_B = torch.bucketize(sigma_B, EDGES)
        factor_Bcc = FACTOR.float() + self._deltas(network, "factor", interval_B)
        mean_Bc = mean_Bc + self._deltas(network, "mean", interval_B)
        return gaussian_velocity(mean_Bc, factor_Bcc @ factor_Bcc.mT, latents_Bchw, sigma_B)

    def _deltas(self, network: Network, key: str, place_B: Tensor) -> Tensor:
        return self.adapters.total(network, key)[place_B]

    def decode(self, latents_Bchw: Tensor) -> Tensor:
        """An affine map, so that a linear reward of images is one of latents."""
        return 0.5 + 0.25 * latents_Bchw

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        assert num_steps == STEPS
        return SIGMAS


def linear(matrix_Bcc: Tensor, latents_Bchw: Tensor) -> Tensor:
    """Every pixel times its sample's matrix."""
    return (matrix_Bcc @ latents_Bchw.flatten(2)).view_as(latents_Bchw)


def gaussian_velocity(mean_Bc: Tensor, covariance_Bcc: Tensor, latents_Bchw: Tensor, sigma_B: Tensor) -> Tensor:
    """`Gaussian.velocity` at s = 0 with a mean and a covariance for each sample, pixel by pixel."""
    identity_cc, level_B11 = torch.eye(CHANNELS), sigma_B.view(-1, 1, 1)
    keep_B11 = 1 - level_B11
    variance_Bcc = keep_B11**2 * covariance_Bcc + level_B11**2 * identity_cc
    regression_Bcc = (level_B11 * identity_cc - keep_B11 * covariance_Bcc) @ torch.linalg.inv(variance_Bcc)
    centred_Bchw = latents_Bchw - (keep_B11[..., 0] * mean_Bc)[:, :, None, None]
    return linear(regression_Bcc, centred_Bchw) - mean_Bc[:, :, None, None]


def prompted(strength: float) -> Gaussian:
    """The teacher's pixels for a prompt of this strength; times c, those under guidance c."""
    return Gaussian(TEACHER.mean_c + strength * DIRECTION, TEACHER.covariance_cc)


def student(backbone: GaussianBackbone, strength: float) -> AffineGenerator:
    """The student as it is now, for a prompt of this strength."""
    generator = teachers_own_steps(prompted(strength), SIGMAS, ETA)
    generator.weights_Tcc += backbone.adapters.total(Network.STUDENT, "weight").detach()
    generator.biases_Tc += backbone.adapters.total(Network.STUDENT, "bias").detach()
    return generator


def student_deltas(wanted: AffineGenerator, strength: float) -> dict[str, Tensor]:
    """The adapter that makes the student this generator for prompts of this strength."""
    base = teachers_own_steps(prompted(strength), SIGMAS, ETA)
    return {
        "weight": (wanted.weights_Tcc - base.weights_Tcc).float(),
        "bias": (wanted.biases_Tc - base.biases_Tc).float(),
    }
