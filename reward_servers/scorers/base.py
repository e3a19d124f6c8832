"""Base class of scorers. Subclass `Scorer`, then serve it with `--scorer package.module:Class`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, Self

import numpy as np

from common.errors import ConfigError, ModelError, RewardRejected, RewardUnavailable
from common.rewards.api import (
    ANY_REWARD,
    CHANNELS,
    MAX_PROMPT_BYTES,
    ByteArray,
    FloatArray,
    GradientRequest,
    Metadata,
    ScoreRequest,
)
from common.types import Precision
from reward_servers.scorers import MOVED_SCORERS

CHECK_SIDE = 64
CHECK_GREY = 128
FORMER_NAMES = {"probe_prompt": "check_prompt", "probe_metadata": "check_metadata"}
"""Each former attribute of `Scorer` maps to its present name."""


@dataclass(frozen=True)
class ScorerLimits:
    """Bounds on a scorer's input. The server refuses anything else with 422 before it is queued.

    Attributes:
        side_multiple: height and width of an image are multiples of it.
        max_pixels: of one image; None leaves it to the server's own limit.
        prompt_bytes: of one prompt, in UTF-8.
        metadata_items: keys and values of one image's metadata, those in nested lists and maps included.
    """

    side_multiple: int = 1
    max_pixels: int | None = None
    prompt_bytes: int = MAX_PROMPT_BYTES
    metadata_items: int = 256

    def check(self, request: ScoreRequest | GradientRequest) -> None:
        """RewardRejected for a request that the scorer does not take."""
        shape = request.images_BHWC.shape[1:3] if isinstance(request, ScoreRequest) else request.images_BCHW.shape[2:]
        self._check_size(*shape)
        for prompt in {id(prompt): prompt for prompt in request.prompts}.values():
            # A character has at most four bytes.
            if 4 * len(prompt) > self.prompt_bytes and len(prompt.encode()) > self.prompt_bytes:
                _reject(f"a prompt has {len(prompt.encode())} bytes, this scorer takes {self.prompt_bytes}: shorten it")
        for about in {id(about): about for about in request.metadata}.values():
            if about and _items(about, self.metadata_items) > self.metadata_items:
                _reject(f"the metadata of an image has more than {self.metadata_items} items: send fewer")

    def _check_size(self, height: int, width: int) -> None:
        if height % self.side_multiple or width % self.side_multiple:
            _reject(f"an image has {height} x {width} pixels, this scorer takes multiples of {self.side_multiple}")
        if self.max_pixels is not None and height * width > self.max_pixels:
            _reject(f"an image has {height} x {width} pixels, this scorer takes {self.max_pixels}: shrink it")


class ModelUnavailable(RewardUnavailable):
    """The process of the model has ended, or is loading the model again: other requests would fail as well."""


def _items(value: object, most: int) -> int:
    """Keys and values in nested lists and maps, counted up to little more than `most`."""
    left, count = [value], 0
    while left and count <= most:
        one = left.pop()
        inside = [*one, *one.values()] if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else []
        count += len(inside)
        left += inside
    return count


def _reject(message: str) -> NoReturn:
    raise RewardRejected(ANY_REWARD, "request", message)


class Scorer(ABC):
    """Scores images. One thread runs one call at a time; any exception fails the requests of that call.

    Attributes:
        name: the scorer's name in responses and metrics (`--name` replaces it).
        score_range: declared (low, high); the client refuses a score outside it. Use infinities when there is no bound.
        differentiable: whether `score_with_gradient` exists.
        weights_hash: identity of the weights (see common.wire.fingerprint); a client stops when it changes mid-run.
        version, preprocess_version: increase them when the same weights begin to score differently.
        precision: type in which the model computes, declared to clients.
        precisions: those that can be chosen (`--precision`).
        gpu_precision: the one of its published recipe on GPUs, where it is the default; None keeps that of `load`.
        limits: sizes and texts that it takes.
        check_prompt, check_metadata: prompt and metadata of the test image that the server scores before it is ready.
    """

    name: str
    score_range: tuple[float, float]
    differentiable: bool = False
    weights_hash: str = ""
    version: str = "1"
    preprocess_version: str = "1"
    precision: Precision = Precision.FLOAT32
    precisions: tuple[Precision, ...] = (Precision.FLOAT32,)
    gpu_precision: Precision | None = None
    limits: ScorerLimits = ScorerLimits()
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

    @classmethod
    def require_precision(cls, precision: Precision | None) -> None:
        """ConfigError for a precision in which this scorer cannot compute. None stands for its own choice."""
        if precision is not None and precision not in cls.precisions:
            known = ", ".join(cls.precisions)
            remedy = f"choose {known}" if known else "the server of its model decides, see its settings"
            raise ConfigError(f"--precision {precision}: the scorer {cls.name} cannot compute in it: {remedy}")

    def use(self, precision: Precision) -> None:
        """Compute in this precision from now on. It is one of `precisions`."""
        self.precision = precision

    def implementation(self) -> str:
        """The class path that identifies a scorer; a moved class keeps its first one."""
        present = f"{type(self).__module__}:{type(self).__qualname__}"
        return next((first for first, path in MOVED_SCORERS.items() if path == present), present)

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
