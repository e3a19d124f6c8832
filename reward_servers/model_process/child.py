"""The process that runs the models: loads scorers and answers one call after another, until its server is gone.

It imports neither the front nor the batcher. `reward_servers.model_process.process` is its only client.

    find   -> names         import the scorers' classes
    load   -> scorers       load the models
    score, gradient -> arrays
    any    -> error, message (`errors.py`)
"""

from __future__ import annotations

import faulthandler
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ModelError
from common.types import Precision
from common.wire import AnyArray
from reward_servers.loading import ScorerSettings, load, scorer_class
from reward_servers.model_process import errors
from reward_servers.model_process.channel import Channel
from reward_servers.model_process.lifetime import end_with, outlast_stop_signals
from reward_servers.scorers.base import Scorer, ScorerLimits

Reply = tuple[dict[str, Any], Sequence[AnyArray]]


def main(descriptor: int, parent_pid: int) -> int:
    """Serve calls that come over the inherited socket; 0 when the server has closed it."""
    end_with(parent_pid)
    faulthandler.enable()
    outlast_stop_signals()
    with socket.socket(fileno=descriptor) as connected:
        Models().answer(Channel(connected))
    return 0


class Models:
    """The scorers of this process, by served name."""

    def __init__(self) -> None:
        self._kinds: list[tuple[type[Scorer], ScorerSettings]] = []
        self._scorers: dict[str, Scorer] = {}

    def answer(self, channel: Channel) -> None:
        """Answer calls until the other end is closed."""
        try:
            while True:
                channel.send(*self._reply(*channel.receive()))
        except EOFError:
            return

    def _reply(self, call: dict[str, Any], arrays: list[AnyArray]) -> Reply:
        match call["call"]:
            case "find":
                return self._find([_settings(*one) for one in call["of"]])
            case "load":
                return self._load(call["names"], call["device"])
            case _:
                return self._score(call, arrays[0])

    def _find(self, settings: list[ScorerSettings]) -> Reply:
        """Import the classes; the reply has the names under which they are served."""
        spec = ""
        try:
            for one in settings:
                spec = one.scorer
                self._kinds.append((scorer_class(spec), one))
        except Exception as error:
            return errors.of_loading(error, f"--scorer {spec}"), []
        return {"names": [one.name or kind.name for kind, one in self._kinds]}, []

    def _load(self, names: list[str], device: str) -> Reply:
        """Load the models; the reply declares each scorer, its array is the picture of the start-up check."""
        described, pictures = [], []
        spec = ""
        try:
            for name, (kind, one) in zip(names, self._kinds, strict=True):
                spec = one.scorer
                scorer = self._scorers[name] = load(kind, one, device)
                check = scorer.check_request()
                described.append(_declared(scorer) | {"check": [check.prompts, check.metadata]})
                pictures.append(check.images_BHWC)
        except Exception as error:
            return errors.of_loading(error, f"--scorer {spec}"), []
        return {"scorers": described}, pictures

    def _score(self, call: dict[str, Any], images: AnyArray) -> Reply:
        name = call["scorer"]
        scorer, prompts, metadata = self._scorers[name], call["prompts"], call["metadata"]
        try:
            if call["call"] == "score":
                return {}, [np.asarray(scorer.score(images, prompts, metadata), dtype=np.float32)]
            answer = scorer.score_with_gradient(images, prompts, metadata)
            return {}, [np.asarray(part, dtype=np.float32) for part in answer]
        except Exception as error:
            return errors.of_call(error, name), []


def _settings(spec: str, model: str | None, name: str | None, precision: str | None) -> ScorerSettings:
    return ScorerSettings(spec, Path(model) if model else None, name, Precision(precision) if precision else None)


def _declared(scorer: Scorer) -> dict[str, Any]:
    """A scorer's description for its server. After a restart it must be the same."""
    if type(scorer.limits) is not ScorerLimits:
        kind = type(scorer.limits).__name__
        raise ModelError(f"the scorer {scorer.name} has limits of the type {kind}: use ScorerLimits, or --in-process")
    low, high = scorer.score_range
    return {
        "name": scorer.name,
        "low": float(low),
        "high": float(high),
        "differentiable": bool(scorer.differentiable),
        "weights_hash": scorer.weights_hash,
        "version": scorer.version,
        "preprocess_version": scorer.preprocess_version,
        "implementation": scorer.implementation(),
        "precision": str(scorer.precision),
        "limits": asdict(scorer.limits),
    }
