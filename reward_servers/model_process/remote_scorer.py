"""A scorer whose model runs in another process. The batcher uses it like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from common.errors import ModelError
from common.rewards.api import ByteArray, FloatArray, Metadata, ScoreRequest
from common.types import Precision
from reward_servers.model_process.supervisor import Declared, Supervisor
from reward_servers.scorers.base import Scorer, ScorerLimits


class RemoteScorer(Scorer):
    """The scorer that is served as `name` by a model process, with the identity that it declares there."""

    def __init__(self, supervisor: Supervisor, name: str, declared: Declared) -> None:
        values = declared.values
        self.name = values["name"]
        self.score_range = (values["low"], values["high"])
        self.differentiable = values["differentiable"]
        self.weights_hash = values["weights_hash"]
        self.version = values["version"]
        self.preprocess_version = values["preprocess_version"]
        self.precision = Precision(values["precision"])
        self.limits = ScorerLimits(**values["limits"])
        self._implementation: str = values["implementation"]
        self._check = declared.check
        self._supervisor = supervisor
        self._served_name = name

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003
        raise ModelError("a remote scorer is made of what its process declares, not loaded")

    def implementation(self) -> str:
        return self._implementation

    def check_request(self) -> ScoreRequest:
        return self._check

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        """Raises what the scorer raises, and ModelUnavailable when its process is lost."""
        (scores_B,) = self._supervisor.ask(self._served_name, "score", images_BHWC, prompts, metadata)
        return scores_B

    def score_with_gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        """Raises as `score`."""
        scores_B, gradients_BCHW = self._supervisor.ask(self._served_name, "gradient", images_BCHW, prompts, metadata)
        return scores_B, gradients_BCHW
