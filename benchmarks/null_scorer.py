"""A scorer that costs nothing: what is left is the price of serving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.rewards.api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.base import Scorer


class NullScorer(Scorer):
    """Zero for every image."""

    name = "null"
    score_range = (0.0, 1.0)
    weights_hash = "none"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003
        return cls()

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        return np.zeros(len(prompts), dtype=np.float32)
