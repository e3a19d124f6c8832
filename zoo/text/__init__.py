"""Gold reader of the text world as a scorer: `zoo.text:GoldReader`. `reader` reads images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from common.errors import ModelError, RewardRejected
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer
from zoo.text.reader import Reader


class GoldReader(Scorer):
    """1.0 for an intact image that shows exactly the word, colour, background and place of its caption, else 0.0."""

    name = "gold"
    score_range = (0.0, 1.0)
    differentiable = False
    check_prompt = 'the word "CAT" in red on white at the top'

    def __init__(self, reader: Reader) -> None:
        state = {name: value.numpy() for name, value in reader.net.state_dict().items()}
        self.weights_hash = fingerprint(tensor_hashes({**state, "threshold": np.array(reader.threshold)}))
        self._reader = reader

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003  (small enough for the CPU)
        if model_dir is None:
            raise ModelError("the gold reader needs its model directory: pass --model DIR")
        return cls(Reader.load(model_dir))

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        try:
            return self._reader.verdict(images_BHWC, prompts).astype(np.float32)
        except ValueError as error:
            raise RewardRejected(self.name, "request", str(error)) from error
