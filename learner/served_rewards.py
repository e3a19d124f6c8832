"""Differentiable rewards that live in another process: their scores with the graph to the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.reward_client import RewardClient
from learner.objectives.reward_gradient import attach_gradient


class ServedRewards:
    """Asks reward servers for score and d score / d image, so that the learner holds no reward model."""

    def __init__(self, client: RewardClient, names: Sequence[str]) -> None:
        self._client = client
        self._names = tuple(names)

    def differentiable(self, images_BCHW: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Name -> [B], with the graph to `images_BCHW` (float in [0, 1]).

        Raises:
            RewardError: a server could not be reached or its answer is not usable.
        """
        sent = images_BCHW.detach().float().cpu().contiguous().numpy()
        rewards = {}
        for name in self._names:
            scores, gradients = self._client.gradient(name, sent, list(texts))
            gradients_BCHW = torch.tensor(gradients, device=images_BCHW.device)
            rewards[name] = attach_gradient(
                torch.tensor(scores, device=images_BCHW.device), gradients_BCHW, images_BCHW
            )
        return rewards
