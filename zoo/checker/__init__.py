"""Gold checker as a scorer: `zoo.checker:GoldScorer`. `parsing` reads images, `training` is its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from common.errors import ModelError, RewardRejected
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer
from zoo.checker.parsing import GoldChecker


class GoldScorer(Scorer):
    """1.0 for an intact image that is exactly what its caption asks for, else 0.0; no gradient."""

    name = "gold"
    score_range = (0.0, 1.0)
    differentiable = False
    check_prompt = "small red circle above big blue square on white"

    def __init__(self, checker: GoldChecker) -> None:
        state = {name: value.numpy() for name, value in checker.net.state_dict().items()}
        thresholds = {name: np.array(value) for name, value in asdict(checker.thresholds).items()}
        self.weights_hash = fingerprint(tensor_hashes(state | thresholds))
        self._checker = checker

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003  (small enough for the CPU)
        if model_dir is None:
            raise ModelError("the gold scorer needs its model directory: pass --model DIR")
        return cls(GoldChecker.load(model_dir))

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        try:
            return self._checker.verdict(images_BHWC, prompts).astype(np.float32)
        except ValueError as error:
            raise RewardRejected(self.name, "request", str(error)) from error
