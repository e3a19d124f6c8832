"""LoRA adapters on frozen transformers, with protection against two mistakes.

A peft layer stores "the active adapter" as state, and setting it also switches `requires_grad`. So a forward pass can
silently use the wrong network, an optimizer can silently hold frozen parameters, and an activation that is recomputed
in the backward pass uses whichever adapter is active by then. Here:

- a network is chosen for the duration of a `with` block, and the previous choice is restored;
- trainable adapters are declared once, and re-asserted after every switch;
- `checkpoint` remembers the network of the forward pass and uses it for the recomputation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint as recompute

from common import seeding
from common.backbones.lora_targets import binds, require_bound
from common.errors import ModelError, WeightUpdateError


class AdapterBank:
    """Named LoRA adapters. A network is a base with a stack of adapters, whose updates add up."""

    def __init__(self, bases: Mapping[str, nn.Module], *, rank: int, alpha: int, targets: Sequence[str]) -> None:
        """Freeze the base of each network; all networks often share one module.

        Adapters bind to the submodules whose name ends in one of `targets`.
        """
        self._bases = {network: base.requires_grad_(False) for network, base in bases.items()}
        self._rank, self._alpha, self._targets = rank, alpha, tuple(targets)
        self.scale = alpha / rank
        self._base_of: dict[str, nn.Module] = {}
        self._layers: list[tuple[str, LoraLayer]] = []
        self._networks: dict[str, tuple[str, ...]] = {}
        self._trainable: set[str] = set()
        self._active: tuple[str, ...] = ()

    def add(
        self, name: str, *, seed: int, trainable: bool, network: str = "student", init_std: float | None = None
    ) -> None:
        """Add a float32 adapter to the base of `network`. It has no effect yet, because its B is zero.

        A is Gaussian with standard deviation `init_std` (None: 1 / rank), a function of `seed` and the name.

        Raises:
            ModelError: one of the targets binds to no linear layer; nothing has changed then.
        """
        base = self._bases[network]
        settings = LoraConfig(
            r=self._rank, lora_alpha=self._alpha, target_modules=self._bound_layers(base), init_lora_weights="gaussian"
        )
        with warnings.catch_warnings():
            # peft warns about several adapters on one module, which is the purpose of this class.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(settings, base, adapter_name=name)
        self._base_of[name] = base
        self._layers = [
            (path, layer)
            for module in self.modules()
            for path, layer in module.named_modules()
            if isinstance(layer, LoraLayer)
        ]
        if trainable:
            self._trainable.add(name)
        for key, parameter in self.parameters(name).items():
            # peft uses the base's dtype, but a small step on a bfloat16 weight would be rounded away.
            parameter.data = parameter.data.float()
            if ".lora_A." in key:
                noise = seeding.normal(parameter.shape, seed=seed, purpose=f"lora/{name}/{key}")
                parameter.data.copy_(noise / self._rank if init_std is None else noise * init_std)
        self._activate(())

    def modules(self) -> list[nn.Module]:
        """The bases, without duplicates."""
        return list({id(base): base for base in self._bases.values()}.values())

    def _bound_layers(self, base: nn.Module) -> list[str]:
        """Paths of the linear layers that get an adapter. peft refuses a suffix that also names a container."""
        layers = [path for path, part in base.named_modules() if isinstance(part, nn.Linear | LoraLayer)]
        require_bound(self._targets, layers)
        return [layer for layer in layers if any(binds(target, layer) for target in self._targets)]

    def freeze(self, name: str) -> None:
        """Stop training an adapter; it remains part of its networks."""
        self._trainable.discard(name)
        self._activate(self._active)

    def define(self, network: str, stack: Sequence[str]) -> None:
        """Define a network's adapters; an empty stack is the bare base.

        Raises:
            ModelError: one of them is bound to the base of another network.
        """
        foreign = [name for name in stack if name in self._base_of and self._base_of[name] is not self._bases[network]]
        if foreign:
            raise ModelError(f"{network} has a base of its own, but adapter {foreign[0]!r} was added to another one")
        self._networks[network] = tuple(stack)

    def stack(self, network: str) -> tuple[str, ...]:
        return self._networks[network]

    @contextmanager
    def active(self, network: str) -> Iterator[nn.Module]:
        """The base of `network`; inside this block a forward pass through it uses the network's adapters."""
        before = self._active
        self._activate(self._networks[network])
        try:
            yield self._bases[network]
        finally:
            self._activate(before)

    def checkpoint(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Gradient checkpointing whose recomputation uses the network of the forward pass."""
        stack = self._active

        def through_same_network(*inputs: Any) -> Any:
            before = self._active
            self._activate(stack)
            try:
                return function(*inputs)
            finally:
                self._activate(before)

        return recompute(through_same_network, *arguments, use_reentrant=False)

    def parameters(self, name: str) -> dict[str, Parameter]:
        """The adapter's parameters by path, e.g. `transformer_blocks.0.attn.to_q.lora_A.weight`."""
        found = {}
        for path, layer in self._layers:
            for kind, weights in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                if name in weights:
                    found[f"{path}.{kind}.weight"] = weights[name].weight
        return found

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of the adapter's weights, float32 on the CPU."""
        return {
            key: value.detach().to("cpu", torch.float32, copy=True).contiguous()
            for key, value in self.parameters(name).items()
        }

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Overwrite the adapter's weights.

        Raises:
            WeightUpdateError: a key is missing or unknown, or a shape differs; nothing has changed then.
        """
        own = self.parameters(name)
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise WeightUpdateError(
                f"weights do not fit adapter {name!r}: {len(missing)} missing {missing[:2]}, "
                f"{len(unknown)} unknown {unknown[:2]}"
            )
        for key, parameter in own.items():
            if parameter.shape != state[key].shape:
                raise WeightUpdateError(
                    f"weights do not fit adapter {name!r}: {key} is {list(state[key].shape)}, "
                    f"expected {list(parameter.shape)}"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def _activate(self, stack: tuple[str, ...]) -> None:
        for _, layer in self._layers:
            if stack:
                layer.enable_adapters(enabled=True)
                layer.set_adapter(list(stack))
            else:
                layer.enable_adapters(enabled=False)
        self._active = stack
        for _, layer in self._layers:
            for weights in (layer.lora_A, layer.lora_B):
                for name, linear in weights.items():
                    linear.requires_grad_(name in self._trainable)


def stacked_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One adapter that equals a stack of adapters: updates add, so the ranks are concatenated.

    sum_i B_i A_i = [B_1 B_2 ...] [A_1; A_2; ...], exactly, with each adapter's scale unchanged.
    """
    return {key: torch.cat([state[key] for state in states], dim=0 if ".lora_A." in key else 1) for key in states[0]}
