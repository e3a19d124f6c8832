"""Group-relative advantages of one or several rewards.

Source: GRPO (arXiv 2402.03300, section 4.1.2) with the per-reward standardisation and the second, batch-wide one of
RTDMD (arXiv 2605.26108). P prompts, G samples per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.flow import upcast
from learner.objectives.loss import renormalised_weights, require_rewards

STD_FLOOR = 1e-4
"""This is added to every standard deviation that divides: nearly equal rewards must not become large advantages."""


def group_advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], scale: Literal["batch", "group"], clip: float
) -> Tensor:
    """Advantages [P, G]: each reward standardised, weighted sum, standardised over the batch, clipped to +-clip.

    A reward whose values are equal within a group contributes exactly 0 to that group. Rewards without a weight are
    recorded but not trained on.

    Args:
        rewards: name -> [P, G].
        weights: name -> weight of the standardised reward in the sum.
        scale: divisor of a reward's deviation from its group's mean: its std over the batch or over the group.
        clip: bound on the result's size.

    Raises:
        ValueError: shapes that differ, groups of one, a weight for an absent reward, a reward that is not finite.
    """
    require_rewards(weights, rewards)
    if not clip > 0:
        raise ValueError(f"clip = {clip} must be positive")
    shapes = {name: tuple(rewards[name].shape) for name in weights}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"rewards differ in shape: {shapes}")
    parts_PG = [weight * reward_advantages(rewards[name], scale, name) for name, weight in weights.items()]
    return _standardised(torch.stack(parts_PG).sum(dim=0), clip)


def renormalised_group_advantages(
    groups: Sequence[Mapping[str, Tensor]],
    weights: Mapping[str, float],
    scale: Literal["batch", "group"],
    clip: float,
) -> Tensor:
    """Advantages [P, G] where some groups lack some rewards; `group_advantages` where none does.

    A departure from RTDMD, for outages: each reward is standardised over the groups that have it, and a group's sum
    uses the weights of the rewards it has, scaled to the sum of all weights. A group with fewer rewards thus has as
    much influence as the others, and missing rewards are not replaced.

    Args:
        groups: P times name -> [G].
        weights, scale, clip: as in `group_advantages`.

    Raises:
        ValueError: as in `group_advantages`; a group without any reward of `weights`.
    """
    present = [[name for name in weights if name in group] for group in groups]
    if all(len(names) == len(weights) for names in present):
        rewards = {name: torch.stack([group[name] for group in groups]) for name in weights}
        return group_advantages(rewards, weights, scale, clip)
    combined = [torch.zeros(()) for _ in groups]
    weights_P = [renormalised_weights(weights, names) for names in present]
    for name in weights:
        places = [place for place, names in enumerate(present) if name in names]
        if not places:
            continue
        standardised = reward_advantages(torch.stack([groups[place][name] for place in places]), scale, name)
        for place, advantages_G in zip(places, standardised, strict=True):
            combined[place] = combined[place] + weights_P[place][name] * advantages_G
    return _standardised(torch.stack(combined), clip)


def _standardised(combined_PG: Tensor, clip: float) -> Tensor:
    # Each group is centred, so the batch mean is 0: subtracting it would only add rounding to groups that must be
    # exactly 0.
    return (combined_PG / (combined_PG.std(correction=0) + STD_FLOOR)).clamp(-clip, clip)


def reward_advantages(rewards_PG: Tensor, scale: Literal["batch", "group"], name: str = "reward") -> Tensor:
    """(r - mean of its group) / (population std + 1e-4) of one reward, [P, G]."""
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"{name} has shape {list(rewards_PG.shape)}: expected [P, G] with at least 2 samples a group")
    if not bool(torch.isfinite(rewards_PG).all()):
        raise ValueError(f"{name} is not finite: a failed score must fail its group before it comes here")
    if scale not in ("batch", "group"):
        raise ValueError(f"scale = {scale!r} must be 'batch' or 'group'")
    values_PG = upcast(rewards_PG)
    # Without the mask, a mean that is off by one rounding would leave a residue in a group of equal rewards.
    centred_PG = (values_PG - values_PG.mean(dim=1, keepdim=True)).masked_fill(_without_spread(values_PG), 0.0)
    if scale == "batch":
        return centred_PG / (values_PG.std(correction=0) + STD_FLOOR)
    return centred_PG / (values_PG.std(dim=1, correction=0, keepdim=True) + STD_FLOOR)


def zero_spread_fraction(rewards_PG: Tensor) -> Tensor:
    """The fraction of groups whose values are all equal and therefore carry no policy signal; shape []."""
    if rewards_PG.ndim != 2:
        raise ValueError(f"expected [P, G], got {list(rewards_PG.shape)}")
    return _without_spread(rewards_PG).float().mean()


def _without_spread(values_PG: Tensor) -> Tensor:
    return values_PG.amax(dim=1, keepdim=True) == values_PG.amin(dim=1, keepdim=True)
