"""AC-DMD with a backbone: trains fake score and student on samples that may still be noisy.

The objectives are pure. This file draws the randomness (a function of `DrawKey`), runs the three networks and passes
the tensors on. Stage 1 uses it at every noise level, stage 2 at the final step, where `sigma_start` is 0.

Source: arXiv 2605.26108; formulas in `common/flow.py` and `learner/objectives/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Backbone, Conditioning, guided_velocity
from common.backbones.device.transfer import pinned, to_device
from common.config.stages import ColdStartConfig, SamplingConfig
from common.flow import ambient_target, clean_prediction, cps_transition, renoise, sample_renoise_level
from common.types import Network
from learner.objectives.ac_dmd import distribution_matching_loss, fake_score_loss
from learner.objectives.consistency import consistency_loss, earlier_sigma
from learner.objectives.loss import Loss
from learner.training.noise_ahead import NoiseAhead

CONSISTENCY_SAMPLES = ("first", "second")
"""Names of the draws of the regulariser's two samples."""


@dataclass(frozen=True)
class DrawKey:
    """Key of the random draws of one update, for the samples `rows` of `batch`.

    Every sample has its own draw, so neither the size of a micro-batch nor the number of ranks changes its noise.

    Attributes:
        ahead: where draws may have begun before they are needed.
    """

    seed: int
    purpose: str
    iteration: int
    rows: Sequence[int]
    batch: int
    ahead: NoiseAhead | None = field(default=None, compare=False)

    def at(self, positions: Sequence[int]) -> DrawKey:
        """The key of the rows at these positions."""
        return replace(self, rows=[self.rows[position] for position in positions])

    def normal(self, what: str, like_Bchw: Tensor) -> Tensor:
        """Standard normal noise per row, each in the shape of a sample of `like_Bchw`."""
        begun = None if self.ahead is None else self.ahead.take(self._name(what))
        noise_Bchw = self._drawn(what, like_Bchw.shape[1:]) if begun is None else begun
        return to_device(noise_Bchw, like_Bchw.device)

    def begin(self, what: str, shape_chw: Sequence[int], device: torch.device) -> None:
        """Begin to draw what `normal` will be asked for, if there is a thread for it."""
        if self.ahead is not None:
            self.ahead.begin(self._name(what), lambda: pinned(self._drawn(what, shape_chw), device))

    def _drawn(self, what: str, shape_chw: Sequence[int]) -> Tensor:
        purpose = f"{self.purpose}/{what}"
        return torch.stack([seeding.normal(shape_chw, purpose=purpose, **self._keys(sample)) for sample in self.rows])

    def _name(self, what: str) -> tuple[str, str, int, tuple[int, ...]]:
        return self.purpose, what, self.iteration, tuple(self.rows)

    def uniform(self, what: str) -> Tensor:
        """One uniform in [0, 1) per row, on the CPU."""
        draws = [seeding.uniform((), purpose=f"{self.purpose}/{what}", **self._keys(sample)) for sample in self.rows]
        return torch.stack(draws)

    def _keys(self, sample: int) -> dict[str, int]:
        return {"seed": self.seed, "iteration": self.iteration, "sample": sample}


@dataclass(frozen=True)
class MatchingSettings:
    """Settings of AC-DMD.

    Attributes:
        guidance: classifier-free guidance of the teacher; the fake score has none.
        eta: stochasticity of every transition.
        fake_max_weight: cap of the fake loss's weight 1 / w^2.
        consistency_weight: weight of the two-sample regulariser in this stage; 0 leaves it out.
        consistency_fraction: fraction of the batch's samples that it is estimated on, rounded up, evenly spread.
    """

    guidance: float
    eta: float
    fake_max_weight: float
    consistency_weight: float
    consistency_fraction: float

    @classmethod
    def of(
        cls, cold_start: ColdStartConfig, sampling: SamplingConfig, guidance: float, consistency_weight: float
    ) -> MatchingSettings:
        """The settings of a stage; only the consistency weight differs between the stages."""
        return cls(
            guidance,
            sampling.eta,
            cold_start.fake_max_weight,
            consistency_weight,
            cold_start.consistency_fraction,
        )


@dataclass(frozen=True)
class Renoised:
    """Samples x_s carried from sigma_start up to their own levels sigma_B."""

    x_start_Bchw: Tensor
    noise_Bchw: Tensor
    latents_Bchw: Tensor
    sigma_start: float
    sigma_B: Tensor


def renoise_samples(x_start_Bchw: Tensor, sigma_start: float, key: DrawKey, lowest: float = 0.0) -> Renoised:
    """Draw a level above `sigma_start` and `lowest` for every sample and renoise the sample to it."""
    x_start_Bchw = x_start_Bchw.detach()
    # Drawn and checked on the CPU, and copied once.
    sigma_B = to_device(sample_renoise_level(key.uniform("level"), max(sigma_start, lowest)), x_start_Bchw.device)
    noise_Bchw = key.normal("renoise", x_start_Bchw)
    latents_Bchw = renoise(x_start_Bchw, noise_Bchw, sigma_start, sigma_B)
    return Renoised(x_start_Bchw, noise_Bchw, latents_Bchw, sigma_start, sigma_B)


def begin_fake_score_noise(backbone: Backbone, settings: MatchingSettings, key: DrawKey) -> None:
    """Begin the draws of `renoise_samples` and `fake_score_objective`."""
    key.begin("renoise", backbone.latent_shape, backbone.device)
    if settings.consistency_weight == 0:
        return
    positions, _ = _regularised(key, settings.consistency_fraction)
    if positions:
        for name in CONSISTENCY_SAMPLES:
            key.at(positions).begin(name, backbone.latent_shape, backbone.device)


def begin_student_noise(backbone: Backbone, key: DrawKey) -> None:
    """Begin the draws of `renoise_samples` and `student_objective`."""
    for name in ("renoise", "project"):
        key.begin(name, backbone.latent_shape, backbone.device)


def fake_score_objective(
    backbone: Backbone, renoised: Renoised, conditioning: Conditioning, settings: MatchingSettings, key: DrawKey
) -> Loss:
    """The fake score's loss on renoised student samples, including the consistency regulariser."""
    velocity = backbone.velocity(Network.FAKE_SCORE, renoised.latents_Bchw, renoised.sigma_B, conditioning)
    target, scale = ambient_target(renoised.x_start_Bchw, renoised.noise_Bchw, renoised.sigma_start, renoised.sigma_B)
    denoising = fake_score_loss(velocity, target, scale, settings.fake_max_weight)
    if settings.consistency_weight == 0:
        return denoising
    consistency = _consistency(backbone, renoised, velocity, conditioning, settings, key)
    value = denoising.value + settings.consistency_weight * consistency.value
    return Loss(value, {**denoising.metrics, **consistency.metrics})


def _consistency(
    backbone: Backbone,
    renoised: Renoised,
    velocity_Bchw: Tensor,
    conditioning: Conditioning,
    settings: MatchingSettings,
    key: DrawKey,
) -> Loss:
    positions, weight = _regularised(key, settings.consistency_fraction)
    if not positions:
        nothing = torch.zeros((), device=velocity_Bchw.device)
        return Loss(nothing, {"consistency_loss": nothing})
    chosen = to_device(torch.tensor(positions), velocity_Bchw.device)
    velocity_Bchw = velocity_Bchw[chosen]
    latents, sigma = renoised.latents_Bchw[chosen], renoised.sigma_B[chosen]
    key = key.at(positions)
    earlier = earlier_sigma(to_device(key.uniform("earlier"), sigma.device), sigma)
    transition = cps_transition(latents, velocity_Bchw.detach(), sigma, earlier, settings.eta)
    # Both samples of every row in one forward pass.
    samples = torch.cat([transition.sample(key.normal(name, latents)) for name in CONSISTENCY_SAMPLES])
    earlier = earlier.repeat(2)
    prediction = backbone.velocity(Network.FAKE_SCORE, samples, earlier, conditioning.rows(chosen.repeat(2)))
    first, second = clean_prediction(samples, prediction, earlier).chunk(2)
    loss = consistency_loss(clean_prediction(latents, velocity_Bchw, sigma), first, second)
    return Loss(weight * loss.value, {name: weight * value for name, value in loss.metrics.items()})


def _regularised(key: DrawKey, fraction: float) -> tuple[list[int], float]:
    """The positions of the regularised rows, and a weight that corrects for other parts of the batch having more.

    This is a function of a row's place in the whole batch, so neither micro-batches nor ranks change it.
    """

    def chosen_before(row: int) -> int:
        # Minus a rounding error, so that a tenth of 10 rows is 1.
        return math.ceil(row * fraction - 1e-9)

    positions = [at for at, row in enumerate(key.rows) if chosen_before(row + 1) > chosen_before(row)]
    return positions, len(positions) / chosen_before(key.batch) * key.batch / len(key.rows)


def student_objective(
    backbone: Backbone,
    sample_Bchw: Tensor,
    renoised: Renoised,
    conditioning: Conditioning,
    empty: Conditioning,
    settings: MatchingSettings,
    key: DrawKey,
) -> Loss:
    """The student's distribution-matching loss: the gradient flows only into `sample_Bchw`.

    The guided teacher and the fake score project the same renoised sample back to `sigma_start` with the same noise.
    """
    with torch.no_grad():
        latents, sigma = renoised.latents_Bchw, renoised.sigma_B
        noise = key.normal("project", latents)
        teacher = guided_velocity(backbone, Network.TEACHER, latents, sigma, conditioning, empty, settings.guidance)
        fake = backbone.velocity(Network.FAKE_SCORE, latents, sigma, conditioning)
        projected = [
            cps_transition(latents, velocity, sigma, renoised.sigma_start, settings.eta).sample(noise)
            for velocity in (fake, teacher)
        ]
    return distribution_matching_loss(sample_Bchw, projected[0], projected[1])
