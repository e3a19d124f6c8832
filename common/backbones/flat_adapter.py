"""An adapter's weights in one float32 tensor, so that a step, a sum, an average or a copy of them is one operation.

    flat_n       | A of layer 1 | B of layer 1 | A of layer 2 | ...
    parameters     [rank, in]     [out, rank]    [rank, in]            views: layers compute with these

The parts are in the order of the names, without gaps. In an `AdapterBank` that is the order of the base's modules, A
before B, so all ranks of a learner have the same. Files, payloads and manifests have one tensor per name instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from common.errors import ModelError, WeightUpdateError


class FlatAdapter:
    """Weights by name that share one tensor's memory, and with it torch's count of changes in place.

    Gradients share a tensor as well. A gradient of zeros is distinguished from a parameter that no pass has reached.

    Attributes:
        name: names the adapter in errors.
        flat_n: all weights, float32 [n]. Change them in place only.
        parameters: name -> view of its part.
    """

    def __init__(
        self, name: str, shapes: Mapping[str, Sequence[int]], *, trainable: bool, device: torch.device | str = "cpu"
    ) -> None:
        """Zeros of these shapes, by name.

        Raises:
            ModelError: there are none.
        """
        if not shapes:
            raise ModelError(f"adapter {name!r} has no weights: name layers for it")
        self.name = name
        self._shapes = {key: torch.Size(shape) for key, shape in shapes.items()}
        self.flat_n = torch.zeros(sum(shape.numel() for shape in self._shapes.values()), device=device)
        self.parameters = {
            key: Parameter(part, requires_grad=trainable) for key, part in self.split(self.flat_n).items()
        }
        self._gradient_n: Tensor | None = None
        self._first = next(iter(self.parameters.values()))

    def split(self, flat_n: Tensor) -> dict[str, Tensor]:
        """A flat tensor's parts by name: views of it."""
        parts = flat_n.split([shape.numel() for shape in self._shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def joined(self, state: Mapping[str, Tensor]) -> Tensor:
        """Tensors of the adapter's names and shapes as one flat tensor."""
        return torch.cat([state[key].flatten() for key in self._shapes])

    @property
    def version(self) -> int:
        """Number of changes in place so far, of all weights together.

        Raises:
            ModelError: see `require_joined`; here only the first parameter is looked at, since every pass asks.
        """
        if self._first.data_ptr() != self.flat_n.data_ptr():
            self.require_joined()
        return self.flat_n._version

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU, float32."""
        return self.split(self.flat_n.to("cpu", torch.float32, copy=True))

    def require_joined(self) -> None:
        """ModelError if a parameter was moved or copied away from the flat tensor, whose changes it no longer has."""
        for key, part in self.split(self.flat_n).items():
            if self.parameters[key].data_ptr() != part.data_ptr():
                raise ModelError(
                    f"adapter {self.name!r}: {key} was moved or copied away from the adapter's memory. Move and copy a "
                    "base before it gets adapters"
                )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the weights.

        Raises:
            WeightUpdateError: a key is missing or unknown, or a shape differs; nothing has changed then.
        """
        missing, unknown = sorted(self._shapes.keys() - state.keys()), sorted(state.keys() - self._shapes.keys())
        if missing or unknown:
            raise WeightUpdateError(
                f"weights do not fit adapter {self.name!r}: {len(missing)} missing {missing[:2]}, "
                f"{len(unknown)} unknown {unknown[:2]}"
            )
        for key, shape in self._shapes.items():
            if state[key].shape != shape:
                raise WeightUpdateError(
                    f"weights do not fit adapter {self.name!r}: {key} is {list(state[key].shape)}, "
                    f"expected {list(shape)}"
                )
        self.flat_n.copy_(self.joined(state))

    @property
    def gradient_n(self) -> Tensor:
        """All gradients in one tensor [n], which backward passes add to after `clear_gradient`."""
        if self._gradient_n is None:
            self._gradient_n = torch.zeros_like(self.flat_n)
        return self._gradient_n

    def clear_gradient(self) -> None:
        """Make the gradient zero, and every parameter's `grad` a view of its part."""
        self.require_joined()
        self.gradient_n.zero_()
        for parameter, part in zip(self.parameters.values(), self.split(self.gradient_n).values(), strict=True):
            # Of `.data`, torch counts the changes apart.
            parameter.grad = part.data

    def reached(self) -> list[bool]:
        """For every parameter, whether a backward pass has reached it since `clear_gradient`.

        Raises:
            ModelError: a gradient was replaced, so that the common tensor lacks it.
        """
        for key, part in self.split(self.gradient_n).items():
            gradient = self.parameters[key].grad
            if gradient is not None and gradient.data_ptr() != part.data_ptr():
                raise ModelError(f"adapter {self.name!r}: the gradient of {key} was replaced: change `grad` in place")
        return [p.grad is not None and p.grad._version > 0 for p in self.parameters.values()]

    def mark_reached(self, reached: Sequence[bool]) -> None:
        """Count these parameters as reached: their gradients came from elsewhere."""
        found = zip(self.parameters.values(), reached, strict=True)
        torch.autograd.graph.increment_version([p.grad for p, due in found if due and p.grad is not None])

    def freeze(self) -> None:
        """Stop training, and drop the gradient."""
        self._gradient_n = None
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
