"""Differentiable rewards in another process: their scores with the graph to the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import RewardRejected
from common.rewards.guard import RewardGuard
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


class ServedRewards:
    """Requests score and d score / d image from reward servers, so that the learner holds no reward model."""

    def __init__(self, guard: RewardGuard, names: Sequence[str]) -> None:
        self._guard = guard
        self.names = tuple(names)

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        """Every reward of `images_BCHW` (float in [0, 1]); all servers are requested in parallel.

        During an outage, `pause` waits for the reward, `renormalise` leaves it out, and `drop_group` leaves all rewards
        out: these samples then get no reward gradient, but still train everything else, because their scores were
        complete. All are also left out under `pause`, for samples at which a healthy reward fails.

        Raises:
            RewardError: a pause reached its limit, or the request itself is wrong.
        """
        sent = images_BCHW.detach().float().cpu().contiguous().numpy()
        texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
        answers = self._guard.gradient(sent, texts, metadata, self.names)
        absent, failure = dict(answers.left_out), answers.failure
        if failure is not None:
            if isinstance(failure, RewardRejected):
                raise failure
            absent[failure.reward] = failure
        left_out = {f"{error.reward}:{error.cause}": len(prompts) for error in absent.values()}
        if failure is not None:
            return DifferentiableRewards({}, left_out)
        device = images_BCHW.device
        scores = {
            name: attach_gradient(
                torch.tensor(scores_B, device=device), torch.tensor(gradients_BCHW, device=device), images_BCHW
            )
            for name, (scores_B, gradients_BCHW) in answers.values.items()
        }
        return DifferentiableRewards(scores, left_out)
