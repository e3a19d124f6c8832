"""Direct back-propagation of differentiable rewards through the deterministic final step (RTDMD, arXiv 2605.26108)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.flow import require_shapes, upcast
from learner.objectives.loss import Loss, require_rewards


def reward_hinge_loss(rewards: Mapping[str, Tensor], weights: Mapping[str, float], target: float) -> Loss:
    """mean relu(target - sum_k w_k r_k): acts on the images that still score below the target.

    Args:
        rewards: name -> [B], with the graph to the images (see `attach_gradient` for a remote reward).
        weights: name -> weight. Rewards without a weight are ignored.

    Metrics: hinge_reward, the mean weighted sum; hinge_active_fraction, the images below the target.

    Raises:
        ValueError: shapes that differ, or a weight for an absent reward.
    """
    require_rewards(weights, rewards)
    require_shapes(1, **{name: rewards[name] for name in weights})
    total_B = torch.stack([weight * upcast(rewards[name]) for name, weight in weights.items()]).sum(dim=0)
    fixed_B = total_B.detach()
    return Loss(
        (target - total_B).relu().mean(),
        {"hinge_reward": fixed_B.mean(), "hinge_active_fraction": (fixed_B < target).float().mean()},
    )


def clip_sample_norms(gradients_Bchw: Tensor, largest: float | None) -> Tensor:
    """Scale every sample's gradient to a norm of at most `largest`; None leaves them unchanged."""
    if largest is None:
        return gradients_Bchw
    norms_B111 = upcast(gradients_Bchw).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    clipped_Bchw: Tensor = gradients_Bchw * (largest / norms_B111.clamp(min=largest))
    return clipped_Bchw


def attach_gradient(scores_B: Tensor, gradients_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Scores [B] whose value is the served score and whose derivative is the served d score / d image.

    This is the first-order expansion of the score around the image that was sent, evaluated at that image: the added
    term is exactly 0, and its gradient with respect to the images is exactly the served one. Autograd does the rest.

    Args:
        scores_B: as served.
        gradients_BCHW: d score_b / d image_b, as served.
        images_BCHW: the images that were scored, with their graph.
    """
    require_shapes(4, gradients_BCHW=gradients_BCHW, images_BCHW=images_BCHW)
    if scores_B.shape != images_BCHW.shape[:1]:
        raise ValueError(f"scores_B has shape {list(scores_B.shape)}, but there are {images_BCHW.shape[0]} images")
    offset_BCHW = upcast(images_BCHW - images_BCHW.detach())
    return upcast(scores_B).detach() + (offset_BCHW * upcast(gradients_BCHW).detach()).sum(dim=(1, 2, 3))
