"""Frozen linear layers as 8-bit integers, for text encoders that are larger than what they are used for.

Weights alone are rounded, symmetrically, with one scale an output row; products are computed in the input's own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127


class Int8Linear(nn.Module):
    """A frozen `nn.Linear` of int8 weights: half the memory of bfloat16, an error of at most half a step a weight."""

    weight_int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # A row of zeros has any scale.
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
        self.register_buffer("weight_int8", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """The weight as it is computed with; some encoders ask a layer for its dtype."""
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
