"""Counts one micro-batch of an alignment update: the trainer's own code on the device of `benchmarks/counting.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.counting import Counter, Counts, counted
from common.backbones.diffusers_backbone import DiffusersBackbone
from common.config.stages import AlignmentConfig, ColdStartConfig, SamplingConfig
from common.rewards.api import FloatArray, Metadata
from common.rewards.guard import Answers, Gradient, RewardGuard
from common.types import PolicyVersion, Prompt, ScoredGroup, StepPlan, TrajectoryGroup
from learner.training import noise_ahead
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.batch_metrics import Totals
from learner.training.distribution_matching import MatchingSettings
from learner.training.networks import Networks, StageSettings
from learner.training.reward_gradients import ServedRewards

REWARDS = {"clipscore": 1.0, "hps": 1.0, "pickscore": 1.0}
"""The published differentiable rewards."""
GUIDANCE = 4.5


class Zeros(RewardGuard):
    """Answers with gradients of zeros."""

    def __init__(self) -> None:
        """There is no client."""

    def gradient(
        self,
        images_BCHW: FloatArray,
        prompts: Sequence[str],  # noqa: ARG002
        metadata: Sequence[Metadata],  # noqa: ARG002
        names: Iterable[str],
    ) -> Answers[Gradient]:
        scores_B = np.zeros(len(images_BCHW), np.float32)
        return Answers({name: (scores_B, np.zeros_like(images_BCHW)) for name in names})


def count_update(backbone: DiffusersBackbone[Any], plan: StepPlan, batch: int) -> dict[str, Counts]:
    """The counts of a micro-batch of this many samples: of the fake score's gradient, and of the student's."""
    settings = AlignmentConfig(prompts_per_iteration=1, group_size=batch, micro_batch=batch)
    cold_start = ColdStartConfig()
    with Counter(), _on_this_thread(), _unfused():
        networks = Networks(backbone, StageSettings.of(cold_start), 0)
        networks.begin_alignment(StageSettings.of(settings))
        matching = MatchingSettings.of(cold_start, SamplingConfig(), GUIDANCE, settings.consistency_weight)
        served = ServedRewards(Zeros(), list(REWARDS))
        trainer = AlignmentTrainer(networks, settings, matching, REWARDS, served, 0)
        samples = trainer._assemble([_group(backbone, plan, batch)])
        (part,) = trainer._parts(samples, "student")

    @torch.enable_grad()
    def student() -> object:
        trainer._student_gradient(samples, *part, Totals(), None)
        return None

    @torch.enable_grad()
    def fake_score() -> object:
        trainer._fake_score_gradient(samples, Totals())
        return None

    work: dict[str, Callable[[], object]] = {"fake_update": fake_score, "student_update": student}
    return {name: counted(one) for name, one in work.items()}


def _group(backbone: DiffusersBackbone[Any], plan: StepPlan, batch: int) -> ScoredGroup:
    states = np.zeros((plan.num_steps + 1, batch, *backbone.latent_shape), np.float32)
    surrogates = np.zeros((plan.num_steps, batch), np.float32)
    trajectory = TrajectoryGroup(Prompt(0, "a red circle"), plan, PolicyVersion(0, ""), states, surrogates)
    return ScoredGroup(trajectory, {name: np.arange(batch, dtype=np.float32) for name in REWARDS})


class AtOnce(Executor):
    """Runs everything when it is submitted: a counter sees its own thread only."""

    def __init__(self, *_: object, **__: object) -> None:
        """It has no threads."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **options))
        return done


def _on_this_thread() -> AbstractContextManager[object]:
    return patch.object(noise_ahead, "ThreadPoolExecutor", AtOnce)


@contextmanager
def _unfused() -> Iterator[None]:
    """torch has no fused AdamW for this device. Its step is not counted."""
    adamw = torch.optim.AdamW
    with patch.object(torch.optim, "AdamW", lambda weights, **options: adamw(weights, **(options | {"fused": False}))):
        yield
