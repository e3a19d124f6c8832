"""Scorers without a model, one of which misbehaves on request. No torch: a server of them starts at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.rewards.api import ByteArray, FloatArray, Metadata
from common.types import Precision
from reward_servers.scorers.base import ModelUnavailable, Scorer

GATE_SECONDS = 10.0


class BrightnessScorer(Scorer):
    """Mean pixel value in [0, 1]; the gradient is known by hand."""

    name = "brightness"
    score_range = (0.0, 1.0)
    differentiable = True
    weights_hash = "none"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        return cls()

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        return (images_BHWC.mean(axis=(1, 2, 3)) / 255).astype(np.float32)

    def score_with_gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        gradients = np.full_like(images_BCHW, 1 / images_BCHW[0].size)
        return images_BCHW.mean(axis=(1, 2, 3)), gradients


class ChoosyScorer(BrightnessScorer):
    """Scores alike in every precision, and declares the chosen one."""

    name = "choosy"
    precisions = tuple(Precision)
    gpu_precision = Precision.BFLOAT16


class MischiefScorer(BrightnessScorer):
    """Does what the first prompt of its batch says: nan, count, range, raise, or wait for metadata["until"]."""

    name = "mischief"
    differentiable = False

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        scores_B = super().score(images_BHWC, prompts, metadata)
        if prompts[0] == "raise":
            raise RuntimeError("asked to fail")
        if prompts[0] == "wait":
            Path(metadata[0]["started"]).touch()
            deadline = time.monotonic() + 30
            while not Path(metadata[0]["until"]).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        wrong = {"nan": np.where(np.arange(len(prompts)) == 0, np.nan, scores_B), "count": scores_B[:-1]}
        return wrong.get(prompts[0], scores_B + 100 if prompts[0] == "range" else scores_B)


class UncheckableScorer(MischiefScorer):
    """Fails its start-up check."""

    check_prompt = "nan"


class RecordingScorer(Scorer):
    """Scores an image by its first pixel; remembers each call; waits at a gate when one is given."""

    name = "recording"
    score_range = (0.0, 255.0)
    differentiable = True

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.gate.set()

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        return cls()

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        self.calls.append(list(prompts))
        self.shapes.append(images_BHWC.shape)
        self.entered.set()
        assert self.gate.wait(GATE_SECONDS)
        if "raise" in prompts:
            raise RuntimeError("no luck")
        if "lost" in prompts:
            raise ModelUnavailable(self.name, "model", "its process has ended")
        scores_B = images_BHWC[:, 0, 0, 0].astype(np.float32)
        scores_B[[prompt == "nan" for prompt in prompts]] = np.nan
        return scores_B[1:] if "short" in prompts else scores_B

    def score_with_gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        self.calls.append(list(prompts))
        return images_BCHW[:, 0, 0, 0], images_BCHW * 2


class FickleScorer(BrightnessScorer):
    """Brightness, in NORMAL_SECONDS per call. Each call fails as the file `mode` in its model directory says.

    slow: ten times NORMAL_SECONDS. shape: a score too few. nan: no number.
    """

    name = "fickle"
    differentiable = False
    NORMAL_SECONDS = 0.1

    def __init__(self, mode: Path) -> None:
        self._mode = mode

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        assert model_dir is not None
        return cls(model_dir / "mode")

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        mode = self._mode.read_text()
        time.sleep(self.NORMAL_SECONDS * (10 if mode == "slow" else 1))
        scores_B = super().score(images_BHWC, prompts, metadata)
        if mode == "shape":
            return scores_B[:-1]
        return scores_B * np.float32("nan") if mode == "nan" else scores_B
