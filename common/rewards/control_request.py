"""A known-good control request: it distinguishes a failing server from a bad request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.rewards.api import ByteArray, FloatArray, Metadata

SIDE = 64
GREY = 128


@dataclass(frozen=True)
class ControlRequest:
    """A plain grey image with one prompt of the run. Every reward scores it once before the run begins."""

    prompt: str
    metadata: Metadata

    def images_BHWC(self) -> ByteArray:
        return np.full((1, SIDE, SIDE, 3), GREY, np.uint8)

    def images_BCHW(self) -> FloatArray:
        return np.full((1, 3, SIDE, SIDE), GREY / 255, np.float32)
