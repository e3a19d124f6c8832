"""Return type of every objective."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and the metrics to report about it.

    Attributes:
        value: shape [], with its graph.
        metrics: name -> number or detached tensor of shape [] (a tensor, so that reporting does not wait for the
            device).
    """

    value: Tensor
    metrics: Mapping[str, float | Tensor]

    def __post_init__(self) -> None:
        if self.value.ndim != 0:
            raise ValueError(f"a loss is a scalar, got shape {list(self.value.shape)}")
        for name, metric in self.metrics.items():
            if isinstance(metric, Tensor) and metric.ndim != 0:
                raise ValueError(f"metric {name} has shape {list(metric.shape)}: a metric is a scalar")
            if isinstance(metric, Tensor) and metric.requires_grad:
                raise ValueError(f"metric {name} still holds its graph: detach it")


def require_rewards(weights: Mapping[str, float], served: Iterable[str]) -> None:
    """Raise ValueError when there is no weight, or a weight names an absent reward."""
    if not weights:
        raise ValueError("weights is empty: name at least one reward to train on")
    present = sorted(served)
    absent = sorted(set(weights) - set(present))
    if absent:
        raise ValueError(f"weights name the rewards {absent}, but only {present} are there")


def renormalised_weights(weights: Mapping[str, float], present: Collection[str]) -> dict[str, float]:
    """The weights of the available rewards, scaled so that they sum to the sum of all weights.

    With every reward present they are exactly the given weights. Raises ValueError when none is present.
    """
    require_rewards(weights, weights)
    kept = {name: weight for name, weight in weights.items() if name in present}
    if not kept:
        raise ValueError(f"none of the rewards {sorted(weights)} is there: such samples must be dropped")
    if len(kept) == len(weights):
        return kept
    scale = sum(weights.values()) / sum(kept.values())
    return {name: weight * scale for name, weight in kept.items()}
