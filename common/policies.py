"""Sampling settings for each policy of a run: from the run file, or from explicit overrides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from common.config.run import Config
from common.errors import ConfigError
from common.types import Network

TEACHER = "teacher"


@dataclass(frozen=True)
class SamplingSpec:
    """The settings of an evaluation's sampling: network, number of steps, guidance (1 is none) and stochasticity."""

    network: Network
    num_steps: int
    guidance: float
    eta: float


def student_spec(config: Config) -> SamplingSpec:
    return SamplingSpec(Network.STUDENT, config.sampling.steps, guidance=1.0, eta=config.sampling.eta)


def teacher_spec(config: Config) -> SamplingSpec:
    """The teacher in its intended setting: many steps, with guidance."""
    evaluation = config.evaluation
    return SamplingSpec(Network.TEACHER, evaluation.teacher_steps, evaluation.teacher_guidance, eta=0.0)


def few_step_teacher_spec(config: Config) -> SamplingSpec:
    """The teacher under the student's conditions: as many steps, no guidance."""
    return SamplingSpec(Network.TEACHER, config.sampling.steps, guidance=1.0, eta=0.0)


def policy_spec(config: Config, policy: str, steps: int | None, guidance: float | None) -> SamplingSpec:
    """The sampling settings of `policy`, with `steps` or `guidance` replaced if given.

    Raises:
        ConfigError: a student is asked to sample with guidance, or the guidance is below 1.
    """
    if policy != TEACHER and guidance is not None:
        raise ConfigError(
            f"--guidance {guidance:g} with --policy {policy}: the student was trained without guidance and has no use "
            f"for it; leave it out, or use --policy {TEACHER}"
        )
    if guidance is not None and not 1 <= guidance < math.inf:
        raise ConfigError(f"--guidance {guidance:g}: a guidance scale is at least 1, which is none")
    spec = teacher_spec(config) if policy == TEACHER else student_spec(config)
    return replace(
        spec,
        num_steps=spec.num_steps if steps is None else steps,
        guidance=spec.guidance if guidance is None else guidance,
    )
