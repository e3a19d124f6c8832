"""A scorer without a model that ends its process, fails and changes on request. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.errors import ConfigError, RewardOverloaded, RewardRejected, RewardUnavailable
from common.rewards.api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.base import ScorerLimits
from tests.helpers.toy_scorers import MischiefScorer

ERRORS = {
    "refuse": RewardRejected("fragile", "request", "not this one"),
    "busy": RewardOverloaded("fragile", "overloaded", "not now", 2.5),
    "away": RewardUnavailable("fragile", "timeout", "nobody answers"),
    "bug": RuntimeError("two\nlines"),
}
EXIT_STATUS = 3


class FragileScorer(MischiefScorer):
    """Brightness, and of a call with metadata, the sum of each image's `add`.

    The first prompt may be one of `ERRORS`, or "exit". The file `weights` of the model directory is the weights hash;
    without it the scorer cannot be loaded.
    """

    name = "fragile"
    differentiable = True
    limits = ScorerLimits(side_multiple=2)
    check_prompt = "check"

    def __init__(self, weights_hash: str) -> None:
        self.weights_hash = weights_hash

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        assert model_dir is not None, "no directory"
        if not (model_dir / "weights").exists():
            raise ConfigError("its weights are missing")
        return cls((model_dir / "weights").read_text())

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        if prompts[0] == "exit":
            os._exit(EXIT_STATUS)
        if prompts[0] in ERRORS:
            raise ERRORS[prompts[0]]
        if prompts[0] == "environment":
            print(*sorted(os.environ), file=sys.stderr, flush=True)
        added = np.array([np.sum(item.get("add", 0)) for item in metadata], dtype=np.float32)
        return super().score(images_BHWC, prompts, metadata) + added


class BoundlessScorer(FragileScorer):
    """Has limits of a type that no other process knows."""

    class Limits(ScorerLimits):
        pass

    limits = Limits()
