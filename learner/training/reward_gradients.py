"""Differentiable rewards: their scores with the graph to the images.

The trainer requests them as soon as it has the images, computes what does not need them, and collects them then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from common.backbones.device.transfer import HostCopy, to_device
from common.errors import RewardRejected
from common.rewards.guard import Answers, Gradient, RewardGuard
from common.types import Prompt
from learner.objectives.reward_gradient import attach_gradient


@dataclass(frozen=True)
class DifferentiableRewards:
    """The rewards of some images, with the graph to them.

    Attributes:
        scores: name -> [B]; empty if these samples get no reward gradient at all.
        left_out: "reward:cause" -> number of samples trained without that reward's gradient.
    """

    scores: Mapping[str, Tensor]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestedRewards:
    """Rewards that were requested.

    Attributes:
        answered: whether `collect` returns at once.
        collect: waits for the rewards; it raises what the request has raised.
    """

    answered: Callable[[], bool]
    collect: Callable[[], DifferentiableRewards]


class RewardGradients(Protocol):
    """The differentiable rewards of a run."""

    names: tuple[str, ...]

    def request(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> RequestedRewards:
        """Request every reward of `images_BCHW` (float in [0, 1])."""
        ...


class InProcessRewards(ABC):
    """Rewards that this process computes, at once."""

    names: tuple[str, ...]

    @abstractmethod
    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        """Every reward of `images_BCHW` (float in [0, 1])."""

    def request(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> RequestedRewards:
        rewards = self.differentiable(images_BCHW, prompts)
        return RequestedRewards(lambda: True, lambda: rewards)


class ServedRewards:
    """Requests score and d score / d image from reward servers, so that the learner holds no reward model."""

    def __init__(self, guard: RewardGuard, names: Sequence[str]) -> None:
        self._guard = guard
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-gradient")
        self.names = tuple(names)

    def request(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> RequestedRewards:
        """Request every reward of `images_BCHW` (float in [0, 1]) in a thread, from all servers in parallel.

        During an outage, `pause` waits for the reward, `renormalise` leaves it out, and `drop_group` leaves all rewards
        out: these samples then get no reward gradient, but still train everything else, because their scores were
        complete. All are also left out under `pause`, for samples at which a healthy reward fails.

        `collect` raises:
            RewardError: a pause reached its limit, or the request itself is wrong.
        """
        sent = HostCopy(images_BCHW.detach().float().contiguous())
        texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
        asked = self._thread.submit(lambda: self._guard.gradient(sent.numpy(), texts, metadata, self.names))
        return RequestedRewards(asked.done, lambda: _attached(asked.result(), images_BCHW))


def _attached(answers: Answers[Gradient], images_BCHW: Tensor) -> DifferentiableRewards:
    """The answered rewards of these images, with the graph to them."""
    absent, failure = dict(answers.left_out), answers.failure
    if failure is not None:
        if isinstance(failure, RewardRejected):
            raise failure
        absent[failure.reward] = failure
    left_out = {f"{error.reward}:{error.cause}": len(images_BCHW) for error in absent.values()}
    if failure is not None:
        return DifferentiableRewards({}, left_out)
    here = partial(to_device, device=images_BCHW.device)
    scores = {
        name: attach_gradient(here(torch.tensor(scores_B)), here(torch.tensor(gradients_BCHW)), images_BCHW)
        for name, (scores_B, gradients_BCHW) in answers.values.items()
    }
    return DifferentiableRewards(scores, left_out)
