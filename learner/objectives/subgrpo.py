"""Policy loss of a step selected for training (SubGRPO, arXiv 2605.26108; clipping from PPO, arXiv 1707.06347).

Departure from GRPO: the ratio is that of surrogate densities (see `common.flow.surrogate_log_density`). With one
optimizer step per batch it is 1 up to rounding, and the gradient is -A grad surrogate. A clip as narrow as 1e-5 then
removes every sample on which sampler and learner disagree numerically, so the clipped fraction is reported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.flow import require_shapes, upcast
from learner.objectives.loss import Loss


def subgrpo_loss(
    surrogate_B: Tensor, old_surrogate_B: Tensor, advantages_B: Tensor, clip_low: float, clip_high: float
) -> Loss:
    """mean max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)),  rho = exp(surrogate - old_surrogate).

    Args:
        surrogate_B: log-density of the sampled transition under the current policy, with its graph.
        old_surrogate_B: the same value, computed by the sampler or by the learner before its update.
        advantages_B: see `advantage.group_advantages`.
        clip_low, clip_high: widths of the clip below and above 1, in [0, 1).

    Metrics: ratio_mean; ratio_max_deviation, the largest |rho - 1|; clipped_fraction, the fraction without gradient.
    """
    require_shapes(1, surrogate_B=surrogate_B, old_surrogate_B=old_surrogate_B, advantages_B=advantages_B)
    for name, width in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not 0 <= width < 1:
            raise ValueError(f"{name} = {width} must lie in [0, 1): it is the distance of the bound from 1")
    weight_B = upcast(advantages_B).detach()
    ratio_B = (upcast(surrogate_B) - upcast(old_surrogate_B).detach()).exp()
    clipped_ratio_B = ratio_B.clamp(1 - clip_low, 1 + clip_high)
    value = torch.maximum(-weight_B * ratio_B, -weight_B * clipped_ratio_B).mean()
    ratio_B = ratio_B.detach()
    silenced_B = ((weight_B > 0) & (ratio_B > 1 + clip_high)) | ((weight_B < 0) & (ratio_B < 1 - clip_low))
    return Loss(
        value,
        {
            "ratio_mean": ratio_B.mean(),
            "ratio_max_deviation": (ratio_B - 1).abs().max(),
            "clipped_fraction": silenced_B.float().mean(),
        },
    )
