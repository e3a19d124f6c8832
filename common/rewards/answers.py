"""Validates a reward server's response against the request and against the identity declared before the run."""

from __future__ import annotations

import math

from common.errors import RewardInvalid
from common.rewards.api import FloatArray, GradientResponse, ScoreResponse, ServerInfo
from common.rewards.http import Exchange

RANGE_TOLERANCE = 1e-4
"""Float arithmetic may exceed the declared range by this fraction of its width (a cosine of 1 + 1e-7)."""


def check_answer(exchange: Exchange, info: ServerInfo, answer: ScoreResponse | GradientResponse, images: int) -> None:
    """RewardInvalid for a wrong number of scores, scores out of range, another scorer or different weights."""
    name, scores_B = exchange.name, answer.scores_B
    if len(scores_B) != images:
        raise RewardInvalid(name, "count", f"{exchange.where}: {len(scores_B)} scores for {images} images")
    outside = outside_range(scores_B, info)
    if outside is not None:
        raise RewardInvalid(name, "range", f"{exchange.where}: {outside}")
    expected, found = (info.scorer, info.weights_hash), (answer.scorer, answer.weights_hash)
    if found != expected:
        message = f"scorer and weights were {expected}, now {found}: a reward must not change in a run"
        raise RewardInvalid(name, "weights_changed", f"{exchange.where}: {message}")


def outside_range(scores_B: FloatArray, info: ServerInfo) -> str | None:
    """A message for scores outside the declared range, else None. A half-open range is checked at its finite end."""
    ends = [abs(end) for end in (info.low, info.high) if math.isfinite(end)]
    width = info.high - info.low if len(ends) == 2 else max(1.0, *ends, 0.0)
    slack = RANGE_TOLERANCE * width
    low, high = float(scores_B.min()), float(scores_B.max())
    if info.low - slack <= low and high <= info.high + slack:
        return None
    return f"scores span [{low:g}, {high:g}], declared is [{info.low:g}, {info.high:g}]"
