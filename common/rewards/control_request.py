"""Known-good control requests: one distinguishes a failing server from a bad request, one a newcomer from a liar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.rewards.api import ByteArray, FloatArray, Metadata, ScoreRequest, ServerInfo

SIDE = 64
GREY = 128
BLOCKS = (4, 16)
"""Sides of the blocks of colour in the random pictures, one picture for each."""
AGREEMENT = 1e-2
"""Scores of one picture by two servers may differ by this fraction of the declared range, of an open one by this
fraction of the score or of 1: models in bfloat16 on different devices differ by less."""


@dataclass(frozen=True)
class ControlRequest:
    """A plain grey image with one prompt of the run. Every reward scores it once before the run begins."""

    prompt: str
    metadata: Metadata

    def images_BHWC(self) -> ByteArray:
        return np.full((1, SIDE, SIDE, 3), GREY, np.uint8)

    def images_BCHW(self) -> FloatArray:
        return np.full((1, 3, SIDE, SIDE), GREY / 255, np.float32)

    def random_pictures(self, seed: int) -> ScoreRequest:
        """A request for pictures that nobody can foresee who does not know the seed."""
        count = len(BLOCKS)
        return ScoreRequest(random_pictures_BHWC(seed), [self.prompt] * count, [self.metadata] * count)


WITHOUT_PROMPT = ControlRequest('the words "red cat"', {})
"""The control request of a client that knows no prompt of its run."""


@dataclass(frozen=True)
class Reference:
    """The known servers' answer to random pictures. Newcomers must answer the same."""

    seed: int
    scores: tuple[float, ...]

    def difference(self, scores_B: FloatArray, info: ServerInfo) -> str | None:
        """A message for the first score that differs, else None."""
        return next(
            (
                f"it scores random picture {number} as {found:g}, the known servers as {expected:g}"
                for number, (found, expected) in enumerate(zip(scores_B.tolist(), self.scores, strict=True), 1)
                if abs(found - expected) > AGREEMENT * _scale(expected, info)
            ),
            None,
        )


def random_pictures_BHWC(seed: int) -> ByteArray:
    """Pictures of random blocks of colour, uint8 [2, 64, 64, 3]: models tell them apart better than plain noise."""
    random = np.random.default_rng(seed)
    pictures: Sequence[ByteArray] = [
        random.integers(0, 256, (SIDE // block, SIDE // block, 3), np.uint8).repeat(block, 0).repeat(block, 1)
        for block in BLOCKS
    ]
    return np.stack(pictures)


def _scale(score: float, info: ServerInfo) -> float:
    width = info.high - info.low
    return width if math.isfinite(width) else max(1.0, abs(score))
