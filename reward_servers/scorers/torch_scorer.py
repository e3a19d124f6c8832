"""Base class of scorers whose score is a differentiable function of the pixels.

Shape suffixes: B images, C = 3 channels, H W image size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from common.rewards.api import ByteArray, FloatArray, Metadata
from common.torch_device import require_device
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer

LONGEST_PROMPT = 2**13
"""Bytes of a prompt for scorers whose text encoder reads under a hundred tokens: many times what counts, and a few
milliseconds of the tokenizer."""


class TorchScorer(Scorer):
    """Scores and gradients of a frozen float32 model. A subclass defines `_scores_B` and `score_range`."""

    differentiable = True

    def __init__(self, model: nn.Module, device: str) -> None:
        require_device(device)
        state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.weights_hash = fingerprint(tensor_hashes(state))
        # The patch embedding is a convolution, and cuDNN's default TF32 would change scores in the third digit.
        torch.backends.cudnn.allow_tf32 = False
        model.to(device).eval().requires_grad_(False)
        self._device = device

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        images_BCHW = torch.tensor(images_BHWC, device=self._device).permute(0, 3, 1, 2).contiguous().float() / 255
        with torch.no_grad():
            return self._scores_B(images_BCHW, prompts).cpu().numpy()

    def score_with_gradient(
        self,
        images_BCHW: FloatArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],  # noqa: ARG002
    ) -> tuple[FloatArray, FloatArray]:
        pixels_BCHW = torch.tensor(images_BCHW, device=self._device, requires_grad=True)
        scores_B = self._scores_B(pixels_BCHW, prompts)
        # Images do not affect each other, so the gradient of the sum contains each score's own gradient.
        (gradients_BCHW,) = torch.autograd.grad(scores_B.sum(), pixels_BCHW)
        return scores_B.detach().cpu().numpy(), gradients_BCHW.cpu().numpy()

    @abstractmethod
    def _scores_B(self, images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B, 3, H, W] in [0, 1] and B prompts -> float32 [B]; no image's score depends on another image."""
