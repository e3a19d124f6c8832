"""Detector as a scorer: `zoo.detector:DetectorScorer`. `reading` reads images, `training` is its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.errors import ModelError, RewardRejected
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer, ScorerLimits
from zoo.detector.reading import Detector, partial_credit
from zoo.world.scenes import parse_caption

SIDE_MULTIPLE = 8
"""The detector halves an image three times, and enlarges what it found to the same size again."""
MAX_PIXELS = 2**18
"""The search for connected pixels takes seconds for larger images; the shapes world has 64 x 64."""


class DetectorScorer(Scorer):
    """Partial credit of each image for its caption, in [0, 1]; no gradient."""

    name = "detector"
    score_range = (0.0, 1.0)
    differentiable = False
    limits = ScorerLimits(side_multiple=SIDE_MULTIPLE, max_pixels=MAX_PIXELS)
    check_prompt = "small red circle above big blue square on white"

    def __init__(self, detector: Detector) -> None:
        state = {name: value.numpy() for name, value in detector.net.state_dict().items()}
        self.weights_hash = fingerprint(tensor_hashes(state))
        self._detector = detector

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003  (small enough for the CPU)
        if model_dir is None:
            raise ModelError("the detector scorer needs its model directory: pass --model DIR")
        return cls(Detector.load(model_dir))

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        try:
            requests = [parse_caption(prompt) for prompt in prompts]
        except ValueError as error:
            raise RewardRejected(self.name, "request", str(error)) from error
        pairs = zip(requests, self._detector.read(images_BHWC), strict=True)
        return np.array([partial_credit(request, reading) for request, reading in pairs], np.float32)
