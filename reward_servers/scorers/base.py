"""Base class of scorers. Subclass `Scorer`, then serve it with `--scorer package.module:Class`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self

import numpy as np

from common.errors import ModelError
from common.rewards.api import CHANNELS, ByteArray, FloatArray, Metadata, ScoreRequest

CHECK_SIDE = 64
CHECK_GREY = 128
FORMER_NAMES = {"probe_prompt": "check_prompt", "probe_metadata": "check_metadata"}
"""Each former attribute of `Scorer` maps to its present name."""


class Scorer(ABC):
    """Scores images. One thread runs one call at a time; any exception fails the requests of that call.

    Attributes:
        name: the scorer's name in responses and metrics (`--name` replaces it).
        score_range: declared (low, high); the client refuses a score outside it. Use infinities when there is no bound.
        differentiable: whether `score_with_gradient` exists.
        weights_hash: identity of the weights (see common.wire.fingerprint); a client stops when it changes mid-run.
        version, preprocess_version: increase them when the same weights begin to score differently.
        check_prompt, check_metadata: prompt and metadata of the test image that the server scores before it is ready.
    """

    name: str
    score_range: tuple[float, float]
    differentiable: ClassVar[bool] = False
    weights_hash: str = ""
    version: str = "1"
    preprocess_version: str = "1"
    check_prompt: str = "a photo"
    check_metadata: Metadata = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        """Refuse former names of attributes, which would be ignored."""
        super().__init_subclass__()
        for former, present in FORMER_NAMES.items():
            if former in vars(cls):
                raise ModelError(f"{cls.__module__}:{cls.__qualname__} sets {former}: the name is now {present}")

    @classmethod
    @abstractmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        """Build the scorer; ModelError when `model_dir` lacks what it needs. None means that no directory was given."""

    @abstractmethod
    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        """uint8 [B, H, W, 3], B prompts and B dicts -> float32 [B]. An image's score must not depend on its batch.

        Raise RewardRejected for an invalid item before running the model; the rest of the batch is retried without it.
        """

    def check_request(self) -> ScoreRequest:
        """A plain grey image with the prompt and metadata that this scorer needs."""
        picture_BHWC = np.full((1, CHECK_SIDE, CHECK_SIDE, CHANNELS), CHECK_GREY, dtype=np.uint8)
        return ScoreRequest(picture_BHWC, [self.check_prompt], [dict(self.check_metadata)])

    def score_with_gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        """float32 [B, 3, H, W] in [0, 1] -> scores float32 [B] and d score_i / d image_i float32 [B, 3, H, W]."""
        raise NotImplementedError(f"{self.name} declares differentiable = {self.differentiable}, but has no gradient")
