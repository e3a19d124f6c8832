"""Differentiable rewards that live in another process: their scores with the graph to the images."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from common.reward_api import FloatArray
from common.reward_client import RewardClient
from common.types import Prompt
from learner.objectives.reward_gradient import attach_gradient


class ServedRewards:
    """Asks reward servers for score and d score / d image, so that the learner holds no reward model."""

    def __init__(self, client: RewardClient, names: Sequence[str]) -> None:
        self._client = client
        self._names = tuple(names)

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Name -> [B], with the graph to `images_BCHW` (float in [0, 1]); all rewards are asked at the same time.

        Raises:
            RewardError: a server could not be reached or its answer is not usable.
        """
        sent = images_BCHW.detach().float().cpu().contiguous().numpy()
        texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]

        def ask(name: str) -> tuple[FloatArray, FloatArray]:
            return self._client.gradient(name, sent, texts, metadata)

        with ThreadPoolExecutor(max_workers=max(1, len(self._names))) as threads:
            answers = list(threads.map(ask, self._names))
        device = images_BCHW.device
        return {
            name: attach_gradient(
                torch.tensor(scores_B, device=device), torch.tensor(gradients_BCHW, device=device), images_BCHW
            )
            for name, (scores_B, gradients_BCHW) in zip(self._names, answers, strict=True)
        }
