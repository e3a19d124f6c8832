"""A reward learned from the groups' rewards, and the student's ascent of it (TDM-R1, arXiv 2603.07700).

The reward is the log-density ratio of two velocity models, a trained one v and a frozen reference v_ref. At a renoised
state x_t, with the target v* of the state's own denoising (`common.flow.ambient_target`),

    e = mean_chw (v - v*)^2,   e_ref likewise,   reward = e_ref - e

**Learning** is a preference within each group of G samples, whose better samples have positive advantages A:

    L_p = (beta / G) sum over the group of A (e_ref - e)            log-odds that the group is ordered rightly
    loss = mean over the groups of -log sigmoid(L_p) / beta + weight * mean (v - v_ref)^2

While the models are further apart than a bound, a sample with A (e_ref - e) > 0, which already has the right sign, does
not train.

**Ascent**: the reward's gradient at x_t is the difference of the two clean predictions, so a clean prediction x0 of the
student follows

    g = (x0_ref - x0_surrogate) / mean_chw |x0 - x0_surrogate|,   loss = 0.5 mean( (x0 - stopgrad(x0 - g))^2 )
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from common.flow import per_sample, require_shapes, upcast
from learner.objectives.ac_dmd import distribution_matching_loss
from learner.objectives.loss import Loss


def denoising_errors(velocity_Bchw: Tensor, scaled_target_Bchw: Tensor, scale: Tensor) -> Tensor:
    """e = mean_chw (v - v*)^2, shape [B], with the velocity's graph.

    Args:
        scaled_target_Bchw, scale: w v* and w, see `common.flow.ambient_target`.
    """
    require_shapes(4, velocity_Bchw=velocity_Bchw, scaled_target_Bchw=scaled_target_Bchw)
    width = per_sample(scale, velocity_Bchw, "scale")
    target_Bchw = upcast(scaled_target_Bchw).detach() / width
    return (upcast(velocity_Bchw) - target_Bchw).square().mean(dim=(1, 2, 3))


def preference_log_odds(
    error_B: Tensor, reference_error_B: Tensor, advantages_B: Tensor, groups_B: Tensor, groups: int, scale: float
) -> Tensor:
    """scale * sum over each group of A (e_ref - e), shape [P]; samples that are elsewhere add their own part there.

    Args:
        groups_B: the number of each sample's group, int64 in 0 .. `groups` - 1.
        scale: beta / G.
    """
    require_shapes(1, error_B=error_B, reference_error_B=reference_error_B, advantages_B=advantages_B)
    gains_B = scale * upcast(advantages_B) * (upcast(reference_error_B) - upcast(error_B)).detach()
    return torch.zeros(groups, device=gains_B.device).index_add(0, groups_B, gains_B.float())


def preference_loss(
    error_B: Tensor, reference_error_B: Tensor, advantages_B: Tensor, log_odds_B: Tensor, *, too_far: bool
) -> Loss:
    """A loss with the gradient of mean_P -log sigmoid(L_p) / beta: mean_B sigmoid(-L) A e, the sigmoid constant.

    Args:
        error_B: e, with its graph.
        log_odds_B: L_p of each sample's whole group.
        too_far: whether the models are further apart than the bound.

    Metrics: preference_loss, -log sigmoid(L_p) as a mean over samples; log 2 = 0.693 before anything is learned.
    surrogate_held, the fraction of samples that the bound takes out.
    """
    require_shapes(
        1,
        error_B=error_B,
        reference_error_B=reference_error_B,
        advantages_B=advantages_B,
        log_odds_B=log_odds_B,
    )
    odds_B, advantages_B = upcast(log_odds_B).detach(), upcast(advantages_B).detach()
    right_B = advantages_B * (upcast(reference_error_B) - upcast(error_B)).detach() > 0
    held_B = right_B & too_far
    weight_B = (torch.sigmoid(-odds_B) * advantages_B).masked_fill(held_B, 0.0)
    metrics = {"preference_loss": softplus(-odds_B).mean(), "surrogate_held": held_B.float().mean()}
    return Loss((weight_B * upcast(error_B)).mean(), metrics)


def reference_penalty(velocity_Bchw: Tensor, reference_Bchw: Tensor) -> Loss:
    """mean (v - v_ref)^2, which keeps the surrogate near its reference.

    Metrics: surrogate_distance, the same value.
    """
    require_shapes(4, velocity_Bchw=velocity_Bchw, reference_Bchw=reference_Bchw)
    value = (upcast(velocity_Bchw) - upcast(reference_Bchw).detach()).square().mean()
    return Loss(value, {"surrogate_distance": value.detach()})


def ascent_loss(clean_Bchw: Tensor, surrogate_Bchw: Tensor, reference_Bchw: Tensor) -> Loss:
    """A loss whose gradient in the student's clean prediction is g / (B c h w).

    Args:
        clean_Bchw: the student's clean prediction x0, with its graph.
        surrogate_Bchw, reference_Bchw: clean predictions of surrogate and reference at one renoised state.

    Metrics: surrogate_gradient, mean |g|.
    """
    loss = distribution_matching_loss(clean_Bchw, reference_Bchw, surrogate_Bchw)
    return Loss(loss.value, {"surrogate_gradient": loss.metrics["matching_gradient"]})
