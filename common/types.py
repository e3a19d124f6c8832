"""The nouns of the system.

Shape suffixes used throughout the project:

    B samples   P prompts   G samples per prompt (the group)   T steps   S = T + 1 states of a trajectory
    c latent channels   C image channels (3)   h, w latent height and width   H, W image height and width

A group's life: a `Prompt` and a `StepPlan` go to a rollout worker, which holds the weights of one `PolicyVersion`. It
returns a `TrajectoryGroup` (what was sampled), wrapped into a `ScoredGroup` (what every reward said of it). The learner
re-derives nothing: the plan and the version travel with the samples.

Example, four steps of which the first two are trained in this iteration:

    StepPlan(iteration=7, sigmas=(1.0, 0.9, 0.75, 0.5, 0.0), eta=0.9, selected=(0, 1))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file. `index` is its position there and keys the noise shared within its group."""

    index: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSets:
    """A run's prompts: what each stage trains on, and what evaluations ask for."""

    cold_start: Sequence[Prompt]
    alignment: Sequence[Prompt]
    evaluation: Sequence[Prompt]


@dataclass(frozen=True)
class StepPlan:
    """How one iteration samples: the same plan on every worker.

    Attributes:
        iteration: the training iteration the samples are for; part of every random key.
        sigmas: T + 1 noise levels, from 1.0 (noise) down to 0.0 (image).
        eta: stochasticity of coefficient-preserving sampling, in [0, 1].
        selected: the steps whose noise is each sample's own and which enter the policy loss (SubGRPO). On every other
            stochastic step the group shares its noise.
    """

    iteration: int
    sigmas: tuple[float, ...]
    eta: float
    selected: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class PolicyVersion:
    """Which weights made a sample: a counter for people, a fingerprint for machines."""

    number: int
    fingerprint: str


@dataclass(frozen=True)
class TrajectoryGroup:
    """G samples of one prompt.

    Attributes:
        latents_SGchw: float32 [T + 1, G, c, h, w]; state 0 is the initial noise, state T the final clean latents.
        surrogate_TG: float32 [T, G]; the surrogate log-density of each transition as the sampler computed it (0 on
            the deterministic last step).
    """

    prompt: Prompt
    plan: StepPlan
    policy: PolicyVersion
    latents_SGchw: FloatArray
    surrogate_TG: FloatArray

    @property
    def group_size(self) -> int:
        return int(self.latents_SGchw.shape[1])


@dataclass(frozen=True)
class ScoredGroup:
    """A group and what every reward said of it.

    Attributes:
        rewards_G: reward name -> float32 [G], every value finite. A trained reward may be absent: it could not be had,
            and its outage policy is to go on without.
    """

    trajectory: TrajectoryGroup
    rewards_G: Mapping[str, FloatArray]
