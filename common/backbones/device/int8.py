"""Frozen linear layers as 8-bit integers, to save memory in large text encoders.

Only weights are rounded, symmetrically, with one scale per output row; products are computed in the input's own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127


class Int8Linear(nn.Module):
    """A frozen `nn.Linear` with int8 weights: half the memory of bfloat16, at most half a step of error per weight."""

    weight_int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # For a row of zeros any scale is correct.
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
        self.register_buffer("weight_int8", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """The weight used in computation; some encoders ask a layer for its dtype."""
        return self.weight_int8 * self.scale

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)


def quantise_linears(module: nn.Module) -> None:
    """Replace every linear layer below `module`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantise_linears(child)
