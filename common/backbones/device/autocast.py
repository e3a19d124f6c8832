"""The arithmetic of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def arithmetic(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Matrix products in `dtype`, those of float32 adapters on a half-precision base too; norms stay in float32.

    On a CPU the backward pass of fused attention takes, in bfloat16, six times as long as the plain one.
    """
    if dtype == torch.float32:
        yield
    elif device.type == "cpu":
        with torch.autocast("cpu", dtype), sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        with torch.autocast(device.type, dtype):
            yield
