"""Groups that a run keeps for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class GroupPicture:
    """A group as people look at it.

    Attributes:
        strip: an image file, PNG or JPEG: the group's samples side by side, scaled down.
        suffix: of the file's name, with its dot.
        rewards_G: reward -> one score per sample.
    """

    prompt: str
    strip: bytes
    suffix: str
    rewards_G: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TrainedSamples:
    """Samples that an update of stage 2 trained on, for people to look at; the same on every rank.

    Attributes:
        sigmas: the noise levels of the rollout, T + 1.
        advantages_PG: float32 [P, G], of the groups in their order.
        kept_PG: bool [P, G]: the samples that were trained on (alignment.train_fraction).
        policy_steps: the steps that the policy term trained.
        final_step: whether matching or the reward gradient trained the last step.
    """

    sigmas: tuple[float, ...]
    advantages_PG: npt.NDArray[np.float32]
    kept_PG: npt.NDArray[np.bool_]
    policy_steps: tuple[int, ...]
    final_step: bool
