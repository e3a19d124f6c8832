"""A snapshot of the learner: everything that training has changed, held outside its processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.types import FloatArray, Stage


@dataclass(frozen=True)
class LearnerSnapshot:
    """The contents of a checkpoint, as plain arrays, and the policies that groups in flight may have been sampled with.

    Attributes:
        state: the result of `Networks.state`.
        fingerprint: hash of the state. A learner that has loaded it must have the same one.
        policies: version -> fingerprint of the published policies.
    """

    stage: Stage
    state: Mapping[str, FloatArray]
    fingerprint: str
    policies: Mapping[int, str]
