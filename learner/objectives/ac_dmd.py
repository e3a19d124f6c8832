"""Ambient-consistent distribution matching distillation (AC-DMD, arXiv 2605.26108; DMD, arXiv 2311.18828, section 3.2).

The fake score learns the student's distribution from samples that may still be noisy (`common.flow.ambient_target`);
the student follows the difference between the predictions of fake score and teacher for one renoised sample.
"""

from __future__ import annotations

from torch import Tensor

from common.flow import Sigma, holds, per_sample, require_shapes, upcast
from learner.objectives.loss import Loss

NORMALISER_FLOOR = 1e-6
"""Departure: the published normaliser has no floor, and a sample that the teacher reproduces would divide by zero."""


def fake_score_loss(velocity_Bchw: Tensor, scaled_target_Bchw: Tensor, scale: Sigma, max_weight: float) -> Loss:
    """mean( min(1 / w^2, max_weight) (w v - w v*)^2 ): the plain velocity error, bounded where w is small.

    Args:
        velocity_Bchw: the fake score's prediction at x_t, with its graph.
        scaled_target_Bchw, scale: w v* and w, as `common.flow.ambient_target` returns them.
        max_weight: 10 in the published settings.

    Metrics: fake_score_loss; velocity_norm, the root mean square of v, averaged over samples.
    """
    require_shapes(4, velocity_Bchw=velocity_Bchw, scaled_target_Bchw=scaled_target_Bchw)
    if not max_weight > 0:
        raise ValueError(f"max_weight = {max_weight} must be positive")
    width = per_sample(scale, velocity_Bchw, "scale")
    if not holds(width > 0):
        raise ValueError(f"scale = {scale} must be positive: the renoise level must lie above the sample's own")
    velocity_Bchw = upcast(velocity_Bchw)
    error_Bchw = width * velocity_Bchw - upcast(scaled_target_Bchw).detach()
    value = (width.pow(-2).clamp(max=max_weight) * error_Bchw.square()).mean()
    velocity_norm = velocity_Bchw.detach().square().mean(dim=(1, 2, 3)).sqrt().mean()
    return Loss(value, {"fake_score_loss": value.detach(), "velocity_norm": velocity_norm})


def distribution_matching_loss(
    sample_Bchw: Tensor, fake_Bchw: Tensor, teacher_Bchw: Tensor, normalize: bool = True
) -> Loss:
    """A loss whose gradient with respect to the sample is g / (B c h w).

        g = (x^fake - x^teacher) / mean_chw |x - x^teacher|        (without the denominator when not normalize)
        loss = 0.5 mean( (x - stopgrad(x - g))^2 )

    Args:
        sample_Bchw: the student's sample x, with its graph.
        fake_Bchw, teacher_Bchw: x renoised and projected back with fake score and teacher, **with the same noise**.

    Metrics: matching_gradient, mean |g|; teacher_distance, mean |x - x^teacher|.
    """
    require_shapes(4, sample_Bchw=sample_Bchw, fake_Bchw=fake_Bchw, teacher_Bchw=teacher_Bchw)
    sample_Bchw = upcast(sample_Bchw)
    fixed_Bchw, teacher_Bchw = sample_Bchw.detach(), upcast(teacher_Bchw).detach()
    gradient_Bchw = upcast(fake_Bchw).detach() - teacher_Bchw
    distance_B111 = (fixed_Bchw - teacher_Bchw).abs().mean(dim=(1, 2, 3), keepdim=True)
    if normalize:
        gradient_Bchw = gradient_Bchw / distance_B111.clamp(min=NORMALISER_FLOOR)
    value = 0.5 * (sample_Bchw - (fixed_Bchw - gradient_Bchw)).square().mean()
    return Loss(value, {"matching_gradient": gradient_Bchw.abs().mean(), "teacher_distance": distance_B111.mean()})
