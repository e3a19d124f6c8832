"""Arithmetic of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def arithmetic(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Matrix products in `dtype`, including those of float32 adapters on a half-precision base; norms stay in float32.

    On a CPU in bfloat16, the backward pass of fused attention takes six times as long as that of plain attention.
    """
    if dtype == torch.float32:
        yield
    elif device.type == "cpu":
        with torch.autocast("cpu", dtype), sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        with torch.autocast(device.type, dtype):
            yield
