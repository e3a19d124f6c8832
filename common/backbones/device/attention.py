"""Attention kernels of a forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernels(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """The kernels that torch chooses, but plain attention on a CPU in half precision.

    There the backward pass of fused attention takes six times as long.
    """
    if device.type == "cpu" and dtype != torch.float32:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
