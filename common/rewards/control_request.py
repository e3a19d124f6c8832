"""A question that a reward is known to answer: tells whether a failure is the server's or that of what it was asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.rewards.api import ByteArray, FloatArray, Metadata

SIDE = 64
GREY = 128


@dataclass(frozen=True)
class PlainQuestion:
    """A plain grey picture for one prompt of the run, scored once by every server's reward before the run begins."""

    prompt: str
    metadata: Metadata

    def images_BHWC(self) -> ByteArray:
        return np.full((1, SIDE, SIDE, 3), GREY, np.uint8)

    def images_BCHW(self) -> FloatArray:
        return np.full((1, 3, SIDE, SIDE), GREY / 255, np.float32)
