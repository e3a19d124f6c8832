"""LoRA adapters on frozen transformers: which network runs, and what trains.

Three networks share a base, so a forward pass could silently use the wrong one, an optimizer could hold frozen
parameters, and an activation that is recomputed in the backward pass could use another network. Here:

- a network is chosen for the duration of a `with` block: one assignment that all layers read;
- what trains is declared once, by `add` and `freeze`, and every new declaration asserts the earlier ones;
- `checkpoint` remembers the network of the forward pass and uses it for the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint as recompute

from common import seeding
from common.backbones.flat_adapter import FlatAdapter
from common.backbones.lora_linear import ActiveNetwork, LoraLinear, why_unfit
from common.backbones.lora_targets import adapted_layers, binds, require_bound
from common.errors import ModelError, WeightUpdateError


class AdapterBank:
    """Named LoRA adapters. A network is a base with a stack of adapters, whose updates add up.

    Change an adapter's weights in place or with `load`, not through `.data`: the next pass would not notice.
    """

    def __init__(self, bases: Mapping[str, nn.Module], *, rank: int, alpha: int, targets: Sequence[str]) -> None:
        """Freeze the base of each network; all networks often share one module.

        Adapters bind to the submodules whose name ends in one of `targets`. All have the scale alpha / rank, also those
        of another rank.
        """
        self._bases = {network: base.requires_grad_(False) for network, base in bases.items()}
        self._rank, self._alpha, self._targets = rank, alpha, tuple(targets)
        self.scale = alpha / rank
        self._adapters: dict[str, FlatAdapter] = {}
        self._base_of: dict[str, nn.Module] = {}
        self._networks: dict[str, tuple[str, ...]] = {}
        self._copied: dict[str, int] = {}
        self._trainable: set[str] = set()
        self._active = ActiveNetwork()

    def add(
        self,
        name: str,
        *,
        seed: int,
        trainable: bool,
        network: str = "student",
        init_std: float | None = None,
        rank: int | None = None,
    ) -> None:
        """Add a float32 adapter to the base of `network`. It has no effect yet, because its B is zero.

        A is Gaussian with standard deviation `init_std` (None: 1 / rank), a function of `seed` and the name. `rank` is
        the bank's by default.

        Raises:
            ModelError: one of the targets binds to no linear layer, or to one that takes no adapter; nothing has
                changed then.
        """
        rank = rank or self._rank
        self._bind(name, dict.fromkeys(self._bound_layers(self._bases[network]), rank), trainable, network)
        with torch.no_grad():
            for key, parameter in self.parameters(name).items():
                if ".lora_A." in key:
                    noise = seeding.normal(parameter.shape, seed=seed, purpose=f"lora/{name}/{key}")
                    parameter.copy_(noise / rank if init_std is None else noise * init_std)

    def attach(
        self, name: str, state: Mapping[str, Tensor], *, trainable: bool = False, network: str = "student"
    ) -> None:
        """Add an adapter with these weights, on the layers and of the ranks that they have.

        Raises:
            WeightUpdateError: a weight fits no linear layer, or has another shape; nothing has changed then.
            ModelError: one of the layers takes no adapter; nothing has changed then.
        """
        self._bind(name, self.fitting_ranks(name, state, network), trainable, network)
        self.load(name, state)

    def fitting_ranks(self, name: str, state: Mapping[str, Tensor], network: str = "student") -> dict[str, int]:
        """Layer -> rank of an adapter with these weights, which the base of `network` has the layers for.

        Raises:
            WeightUpdateError: a weight fits no linear layer, or has another shape; `name` stands for the adapter.
        """
        layers = _linear_layers(self._bases[network])
        ranks = {path: _rank(name, path, layers, state) for path in adapted_layers(state)}
        if not ranks:
            raise WeightUpdateError(f"adapter {name!r} has no weights: expected LAYER.lora_A.weight and .lora_B.weight")
        return ranks

    def _bind(self, name: str, ranks: Mapping[str, int], trainable: bool, network: str) -> None:
        """Add an adapter of zeros to these layers."""
        if name in self._adapters:
            raise ModelError(f"adapter {name!r} was added before: give this one another name, or load its weights")
        base = self._bases[network]
        layers = {path: layer for path, layer in _linear_layers(base).items() if path in ranks}
        for path, layer in layers.items():
            reason = "" if isinstance(layer, LoraLinear) else why_unfit(layer)
            if reason:
                raise ModelError(f"{path} takes no adapter, {reason}: use a base of plain float weights")
        shapes: dict[str, tuple[int, int]] = {}
        for path, layer in layers.items():
            out_features, in_features = layer.weight.shape
            a, b = _keys(path)
            shapes |= {a: (ranks[path], in_features), b: (out_features, ranks[path])}
        adapter = FlatAdapter(name, shapes, trainable=trainable, device=next(base.parameters()).device)
        for path, layer in layers.items():
            adapted = layer if isinstance(layer, LoraLinear) else LoraLinear(layer, self._active)
            base.set_submodule(path, adapted)
            adapted.add(name, *(adapter.parameters[key] for key in _keys(path)))
        self._adapters[name], self._base_of[name] = adapter, base
        if trainable:
            self._trainable.add(name)
        self._require_declared()

    def modules(self) -> list[nn.Module]:
        """The bases, without duplicates."""
        return list({id(base): base for base in self._bases.values()}.values())

    def _bound_layers(self, base: nn.Module) -> list[str]:
        """Paths of the linear layers that get an adapter."""
        layers = list(_linear_layers(base))
        require_bound(self._targets, layers)
        return [layer for layer in layers if any(binds(target, layer) for target in self._targets)]

    def trains(self, name: str) -> bool:
        """Whether the adapter was declared trainable and not frozen since."""
        return name in self._trainable

    def freeze(self, name: str) -> None:
        """Stop training an adapter; it remains part of its networks."""
        self._trainable.discard(name)
        self._adapters[name].freeze()
        self._require_declared()

    def _require_declared(self) -> None:
        """Require that the adapters declared trainable train, and nothing else does."""
        declared = {id(parameter) for name in self._trainable for parameter in self.parameters(name).values()}
        for module in self.modules():
            for path, parameter in module.named_parameters():
                if parameter.requires_grad != (id(parameter) in declared):
                    change = "trains, but was declared frozen" if parameter.requires_grad else "no longer trains"
                    raise ModelError(f"{path} {change}: leave requires_grad to AdapterBank.add and freeze")

    def share_base(self, network: str, other: str) -> None:
        """Add a network on the base of another one; give it adapters with `define`."""
        self._bases[network] = self._bases[other]

    def define(self, network: str, stack: Sequence[str]) -> None:
        """Define a network's adapters; an empty stack is the bare base.

        Raises:
            ModelError: one of them was never added, or is bound to the base of another network.
        """
        for name in stack:
            if name not in self._adapters:
                raise ModelError(f"{network} has no adapter {name!r}: add it first (added: {sorted(self._adapters)})")
            self._adapters[name].require_joined()
            if self._base_of[name] is not self._bases[network]:
                raise ModelError(f"{network} has a base of its own, but adapter {name!r} was added to another one")
        self._networks[network] = tuple(stack)
        for layer in self._layers(network):
            layer.define(network, stack, self.scale)
        self._copied[network] = -1

    def stack(self, network: str) -> tuple[str, ...]:
        return self._networks[network]

    @contextmanager
    def active(self, network: str) -> Iterator[nn.Module]:
        """The base of `network`; inside this block a forward pass through it uses the network's adapters."""
        self._refresh(network)
        with self._through(network):
            yield self._bases[network]

    def checkpoint(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Gradient checkpointing whose recomputation uses the network of the forward pass."""
        network = self._active.name

        def through_same_network(*inputs: Any) -> Any:
            with self._through(network):
                return function(*inputs)

        return recompute(through_same_network, *arguments, use_reentrant=False)

    @contextmanager
    def _through(self, network: str) -> Iterator[None]:
        before, self._active.name = self._active.name, network
        try:
            yield
        finally:
            self._active.name = before

    def _refresh(self, network: str) -> None:
        """Renew the layers' copies of a network's weights, if those have changed since the last pass."""
        version = sum(self._adapters[name].version for name in self._networks[network])
        if version != self._copied[network]:
            for layer in self._layers(network):
                layer.refresh(network)
            self._copied[network] = version

    def _layers(self, network: str) -> list[LoraLinear]:
        return [part for part in self._bases[network].modules() if isinstance(part, LoraLinear)]

    def adapter(self, name: str) -> FlatAdapter:
        """An adapter's weights; KeyError if there is none of this name."""
        return self._adapters[name]

    def parameters(self, name: str) -> dict[str, Parameter]:
        """The adapter's parameters by path, e.g. `transformer_blocks.0.attn.to_q.lora_A.weight`; none if not added."""
        return dict(self._adapters[name].parameters) if name in self._adapters else {}

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of the adapter's weights, float32 on the CPU."""
        return self._adapters[name].state()

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Overwrite the adapter's weights.

        Raises:
            WeightUpdateError: see `FlatAdapter.load`.
        """
        self._adapters[name].load(state)


def _linear_layers(base: nn.Module) -> dict[str, nn.Linear | LoraLinear]:
    """The linear layers by path, with and without adapters."""
    layers = {path: part for path, part in base.named_modules() if isinstance(part, nn.Linear | LoraLinear)}
    inner = {id(layer.base) for layer in layers.values() if isinstance(layer, LoraLinear)}
    return {path: layer for path, layer in layers.items() if id(layer) not in inner}


def _keys(path: str) -> tuple[str, str]:
    """The names of an adapter's A and B on this layer."""
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _rank(name: str, path: str, layers: Mapping[str, nn.Linear | LoraLinear], state: Mapping[str, Tensor]) -> int:
    """The rank of an adapter's weights on one layer, which they must fit."""
    if path not in layers:
        raise WeightUpdateError(f"adapter {name!r} fits no layer of this model: {path} is not a linear layer of it")
    out_features, in_features = layers[path].weight.shape
    shapes = [list(state[key].shape) if key in state else None for key in _keys(path)]
    rank = shapes[0][0] if shapes[0] else 0
    if not rank or shapes != [[rank, in_features], [out_features, rank]]:
        raise WeightUpdateError(
            f"adapter {name!r} does not fit {path}: its A and B are {shapes[0]} and {shapes[1]}, expected "
            f"[rank, {in_features}] and [{out_features}, rank]"
        )
    return rank


def stacked_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One adapter that equals a stack of adapters: updates add, so the ranks are concatenated.

    sum_i B_i A_i = [B_1 B_2 ...] [A_1; A_2; ...], exactly, with each adapter's scale unchanged. An adapter counts as
    zeros on a layer that only others have, so that the result has one rank.
    """
    likes = {key: value for state in states for key, value in state.items()}
    return {
        key: torch.cat([_part(state, key, like) for state in states], dim=_rank_axis(key))
        for key, like in likes.items()
    }


def _part(state: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    if key in state:
        return state[key]
    shape = list(like.shape)
    shape[_rank_axis(key)] = max(value.shape[_rank_axis(other)] for other, value in state.items())
    return like.new_zeros(shape)


def _rank_axis(key: str) -> int:
    return 0 if ".lora_A." in key else 1
