"""A frozen linear layer with LoRA adapters. The adapters of the active network take part in its forward pass.

    y = W x + b + sum_i scale B_i A_i x = W x + b + B A x      A = [A_1; A_2; ...],  B = scale [B_1 B_2 ...]

Adapters are float32. A forward pass uses copies of them, stacked and in the base's dtype: one product with A, and one
with B that is added into the base's output. `StackedAdapters.refresh` renews the copies after the weights have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ActiveNetwork:
    """The network that forward passes use: one object that all layers of a bank read. An empty name is no network."""

    def __init__(self) -> None:
        self.name = ""


class StackedAdapters(nn.Module):
    """A network's adapters on one layer, as one: their ranks are concatenated. A part of no state dict."""

    a: Tensor
    b: Tensor

    def __init__(self, parts_a: Sequence[nn.Parameter], parts_b: Sequence[nn.Parameter], scale: float, like: Tensor):
        super().__init__()
        self._parts_a, self._parts_b, self.scale = tuple(parts_a), tuple(parts_b), scale
        self.ranks = tuple(len(part) for part in parts_a)
        self.register_buffer("a", like.new_empty(sum(self.ranks), parts_a[0].shape[1]), persistent=False)
        self.register_buffer("b", like.new_empty(parts_b[0].shape[0], sum(self.ranks)), persistent=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the adapters' present weights."""
        for rows, part in zip(self.a.split(self.ranks), self._parts_a, strict=True):
            rows.copy_(part)
        for columns, part in zip(self.b.split(self.ranks, dim=1), self._parts_b, strict=True):
            torch.mul(part, self.scale, out=columns)

    def add_to(self, base: nn.Linear, inputs: Tensor) -> Tensor:
        """The layer's output."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if torch.is_grad_enabled():
            added: Tensor = _AddedProduct.apply(  # type: ignore[no-untyped-call]
                rows, base.weight, base.bias, self.a, self.b, self.scale, self.ranks, *self._parts_a, *self._parts_b
            )
        else:
            added, _ = _added_product(rows, base.weight, base.bias, self.a, self.b)
        return added.view(*inputs.shape[:-1], added.shape[-1])


class LoraLinear(nn.Module):
    """Takes the place of a linear layer; without adapters of the active network it is that layer."""

    def __init__(self, base: nn.Linear, active: ActiveNetwork) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.stacks = nn.ModuleDict()
        self._active = active

    @property
    def weight(self) -> Tensor:
        """The base's weight; some models ask a layer for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def add(self, adapter: str, a: nn.Parameter, b: nn.Parameter) -> None:
        """Add an adapter of any rank: A [rank, in] and B [out, rank]."""
        self.lora_A[adapter], self.lora_B[adapter] = a, b

    def define(self, network: str, stack: Sequence[str], scale: float) -> None:
        """Stack a network's adapters, as far as they are on this layer."""
        if network in self.stacks:
            del self.stacks[network]
        here = [name for name in stack if name in self.lora_A]
        if here:
            like = torch.empty((), dtype=self.base.weight.dtype, device=self.base.weight.device)
            parts_a, parts_b = [self.lora_A[name] for name in here], [self.lora_B[name] for name in here]
            self.stacks[network] = StackedAdapters(parts_a, parts_b, scale, like)

    def refresh(self, network: str) -> None:
        """Copy the present weights of a network's adapters."""
        if network in self.stacks:
            stack: Any = self.stacks[network]
            stack.refresh()

    def forward(self, inputs: Tensor) -> Tensor:
        if self._active.name not in self.stacks:
            base: Tensor = self.base(inputs)
            return base
        stack: Any = self.stacks[self._active.name]
        device = inputs.device.type
        if not torch.is_autocast_enabled(device):
            return stack.add_to(self.base, inputs)  # type: ignore[no-any-return]
        # The layer has a dtype of its own: that of its base.
        with torch.autocast(device, enabled=False):
            return stack.add_to(self.base, inputs.to(self.base.weight.dtype))  # type: ignore[no-any-return]


def _added_product(rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """rows W^T + bias + (rows A^T) B^T with stacked A and B, and rows A^T."""
    low = rows @ a.T
    return functional.linear(rows, weight, bias).addmm_(low, b.T), low


class _AddedProduct(torch.autograd.Function):
    """`_added_product` with gradients of the rows and of the adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        ranks: tuple[int, ...],
        *parameters: Tensor,  # noqa: ARG004
    ) -> Tensor:
        """`parameters` are the adapters' A, then their B: what `a` and `b` are copies of."""
        added, low = _added_product(rows, weight, bias, a, b)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale, ctx.ranks = scale, ranks
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        gradient_low = gradient @ b
        to_rows = (gradient @ weight).addmm_(gradient_low, a) if ctx.needs_input_grad[0] else None
        fixed, count = 7, len(ctx.ranks)
        trains = ctx.needs_input_grad[fixed:]
        # Each adapter has its own rows of A and columns of B; the scale is in B already.
        to_a = [
            part.T @ rows if needed else None
            for part, needed in zip(gradient_low.split(ctx.ranks, dim=1), trains[:count], strict=True)
        ]
        to_b = [
            (gradient.T @ part) * ctx.scale if needed else None
            for part, needed in zip(low.split(ctx.ranks, dim=1), trains[count:], strict=True)
        ]
        return (to_rows, *(None,) * (fixed - 1), *to_a, *to_b)


def why_unfit(layer: nn.Linear) -> str:
    """The reason why adapters cannot be added to this layer; "" if they can."""
    kind, weight = type(layer), layer.weight
    if kind.forward is not nn.Linear.forward:
        return f"it is a {kind.__name__}, which computes in a way of its own"
    if type(weight) is not nn.Parameter and not isinstance(weight, DTensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return ""
