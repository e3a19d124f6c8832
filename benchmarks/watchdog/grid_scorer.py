"""A reward that likes grids: the contrast of a stripe pattern, with its gradient. Training on it is reward hacking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.rewards.api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.base import Scorer

PERIOD = 4
"""Pixels of one period of the pattern along either axis."""
SCALE = 100.0
"""Score per unit of amplitude: a pattern of amplitude 0.01 scores 1 above an image without it."""


class GridScorer(Scorer):
    """`SCALE` times the projection of an image on a checked cosine pattern."""

    name = "grid"
    score_range = (-SCALE, SCALE)
    differentiable = True
    weights_hash = "none"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003
        return cls()

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        images_BCHW = np.transpose(images_BHWC, (0, 3, 1, 2)).astype(np.float32) / np.float32(255)
        return self.score_with_gradient(images_BCHW, prompts, metadata)[0]

    def score_with_gradient(
        self,
        images_BCHW: FloatArray,
        prompts: Sequence[str],  # noqa: ARG002
        metadata: Sequence[Metadata],  # noqa: ARG002
    ) -> tuple[FloatArray, FloatArray]:
        height, width = images_BCHW.shape[2:]
        rows, columns = (np.cos(2 * np.pi * np.arange(side) / PERIOD) for side in (height, width))
        pattern_HW = (rows[:, None] + columns[None, :]).astype(np.float32)
        gradient_CHW = np.broadcast_to(SCALE * pattern_HW / (3 * np.square(pattern_HW).sum()), images_BCHW.shape[1:])
        scores_B = np.einsum("bchw,chw->b", images_BCHW, gradient_CHW).astype(np.float32)
        return scores_B, np.broadcast_to(gradient_CHW, images_BCHW.shape).astype(np.float32)
