"""Negative-aware fine-tuning on the forward process (DiffusionNFT, arXiv 2509.16117).

A rollout's final sample x0 is noised to x at the level sigma. The new velocity v is trained through two implicit ones,
a positive and a negative mixture with the velocity v_old of the policy that made the sample:

    v+ = v_old + beta (v - v_old)        v- = v_old - beta (v - v_old)
    D(v) = mean_chw (x0_hat - x0)^2 / mean_chw |x0_hat - x0|,   x0_hat = x - sigma v,   the divisor is constant
    loss = (A_max / beta) mean[ r D(v+) + (1 - r) D(v-) ],      r = clip(A / (2 A_max) + 1/2, 0, 1)

A good sample (r > 1/2) pulls the velocity towards itself, and a bad one pushes it away. Where v = v_old, D(v+) equals
D(v-), so the gradient is A dD/dv: beta has no effect there, and a sample without advantage has none.
"""

from __future__ import annotations

from torch import Tensor

from common.flow import clean_prediction, require_shapes, upcast
from learner.objectives.loss import Loss

NORMALISER_FLOOR = 1e-5
"""Smallest mean error that divides, as published."""


def optimality(advantages_B: Tensor, bound: float) -> Tensor:
    """r = clip(A / (2 bound) + 1/2, 0, 1): the probability that a sample counts as good, shape [B].

    Raises:
        ValueError: a bound that is not positive.
    """
    require_shapes(1, advantages_B=advantages_B)
    if not bound > 0:
        raise ValueError(f"bound = {bound} must be positive")
    return (upcast(advantages_B).detach() / (2 * bound) + 0.5).clamp(0, 1)


def nft_loss(
    clean_Bchw: Tensor,
    noised_Bchw: Tensor,
    sigma: float,
    velocity_Bchw: Tensor,
    old_velocity_Bchw: Tensor,
    advantages_B: Tensor,
    bound: float,
    beta: float,
) -> Loss:
    """The loss of this file's docstring.

    Args:
        clean_Bchw: the samples x0.
        noised_Bchw: x, the same samples at the level `sigma`.
        velocity_Bchw: v at x, with its graph.
        old_velocity_Bchw: v_old at x.
        advantages_B: see `advantage.group_advantages`; `bound` is the largest they can be, A_max.
        beta: strength of the mixture, positive.

    Metrics: forward_error, mean |x0_hat - x0| of v.
    """
    require_shapes(4, clean_Bchw=clean_Bchw, velocity_Bchw=velocity_Bchw, old_velocity_Bchw=old_velocity_Bchw)
    if not beta > 0:
        raise ValueError(f"beta = {beta} must be positive")
    good_B = optimality(advantages_B, bound)
    old_Bchw = upcast(old_velocity_Bchw).detach()
    # As a change from v_old, so that the two are equal to the bit where v = v_old.
    change_Bchw = beta * (upcast(velocity_Bchw) - old_Bchw)
    positive_B, error_B = _normalised_error(clean_Bchw, noised_Bchw, sigma, old_Bchw + change_Bchw)
    negative_B, _ = _normalised_error(clean_Bchw, noised_Bchw, sigma, old_Bchw - change_Bchw)
    value = bound / beta * (good_B * positive_B + (1 - good_B) * negative_B).mean()
    return Loss(value, {"forward_error": error_B.mean()})


def _normalised_error(
    clean_Bchw: Tensor, noised_Bchw: Tensor, sigma: float, velocity_Bchw: Tensor
) -> tuple[Tensor, Tensor]:
    """D of each sample with its graph, and its divisor: both [B]."""
    deviation_Bchw = clean_prediction(noised_Bchw, velocity_Bchw, sigma) - upcast(clean_Bchw).detach()
    size_B = deviation_Bchw.detach().abs().mean(dim=(1, 2, 3))
    return deviation_Bchw.square().mean(dim=(1, 2, 3)) / size_B.clamp(min=NORMALISER_FLOOR), size_B
