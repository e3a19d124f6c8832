"""Diversity of the images of one prompt, measured by the features of the frozen VAE encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-8
"""Avoids division by zero for a feature vector that is zero everywhere."""


def mean_pairwise_distance(features: Sequence[Tensor]) -> float:
    """Mean perceptual distance over all pairs of G images.

    This has the form of LPIPS (arXiv 1801.03924) without its learned channel weights: at every place and depth the
    channel vector is scaled to length one; squared differences are summed over channels, then averaged over places and
    over depths.

    Args:
        features: feature maps [G, c, h, w], one per depth, G >= 2.

    Returns: 0 for identical images, at most 4.
    """
    count = len(features[0])
    if count < 2:
        raise ValueError(f"diversity needs at least 2 images of a prompt, got {count}")
    first, second = torch.triu_indices(count, count, offset=1)
    per_depth = []
    for feature_Gchw in features:
        unit = feature_Gchw / (feature_Gchw.norm(dim=1, keepdim=True) + EPSILON)
        per_depth.append((unit[first] - unit[second]).square().sum(1).mean())
    return float(torch.stack(per_depth).mean())
