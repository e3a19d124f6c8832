"""Base class of scorers whose score is a differentiable function of the pixels.

Shape suffixes: B images, C = 3 channels, H W image size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from common.rewards.api import ByteArray, FloatArray, Metadata
from common.torch_device import require_device
from common.types import Precision
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer

LONGEST_PROMPT = 2**13
"""Bytes of a prompt for scorers whose text encoder reads under a hundred tokens: many times what counts, and a few
milliseconds of the tokenizer."""
HALF_TYPES = {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}
GRADIENT_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""float16 loses gradients below 6e-8, so they are computed at the largest of these scales at which all are finite."""


class TorchScorer(Scorer):
    """Scores and gradients of a frozen float32 model. A subclass defines `_scores_B` and `score_range`.

    In another precision the weights stay float32, and torch's autocast chooses the operations that run in that type.
    """

    differentiable = True
    precisions = tuple(Precision)
    gpu_precision = Precision.FLOAT32

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
        with torch.no_grad(), self._autocast():
            scores_B = self._scores_B(images_BCHW, prompts)
        return scores_B.float().cpu().numpy()

    def score_with_gradient(
        self,
        images_BCHW: FloatArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],  # noqa: ARG002
    ) -> tuple[FloatArray, FloatArray]:
        pixels_BCHW = torch.tensor(images_BCHW, device=self._device, requires_grad=True)
        with self._autocast():
            scores_B = self._scores_B(pixels_BCHW, prompts).float()
        # Images do not affect each other, so the gradient of the sum contains each score's own gradient.
        gradients_BCHW = self._gradients(scores_B.sum(), pixels_BCHW)
        return scores_B.detach().cpu().numpy(), gradients_BCHW.cpu().numpy()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision is Precision.FLOAT32:
            return nullcontext()
        return torch.autocast(torch.device(self._device).type, HALF_TYPES[self.precision])

    def _gradients(self, score: torch.Tensor, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """d score / d pixels, float32. It is not finite where it exceeds the range of the precision."""
        if self.precision is not Precision.FLOAT16:
            (gradients_BCHW,) = torch.autograd.grad(score, pixels_BCHW)
            return gradients_BCHW
        for scale in GRADIENT_SCALES:
            (scaled_BCHW,) = torch.autograd.grad(scale * score, pixels_BCHW, retain_graph=True)
            gradients_BCHW = scaled_BCHW / scale
            if gradients_BCHW.isfinite().all():
                break
        return gradients_BCHW

    @abstractmethod
    def _scores_B(self, images_BCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B, 3, H, W] in [0, 1] and B prompts -> float32 [B]; no image's score depends on another image."""
