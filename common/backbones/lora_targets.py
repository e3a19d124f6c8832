"""Where a LoRA binds: the linear layers whose names end in one of its targets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from common.errors import ModelError


def require_bound(targets: Sequence[str], layers: Collection[str]) -> None:
    """A target that binds to nothing is a misspelling that peft would pass over if another one binds.

    Raises:
        ModelError: there is one.
    """
    unbound = [target for target in targets if not any(binds(target, layer) for layer in layers)]
    if unbound:
        raise ModelError(f"lora.targets {unbound} bind to no module: no linear layer's name ends so")


def adapted_layers(state: Iterable[str]) -> tuple[str, ...]:
    """The layers that an adapter with these weights (`LAYER.lora_A.weight`, `LAYER.lora_B.weight`) is on."""
    return tuple(sorted({key.rpartition(".lora_")[0] for key in state}))


def suffixes(layers: Iterable[str]) -> list[str]:
    """The targets that bind to these layers in every block: `blocks.3.attn.to_q` becomes `attn.to_q`."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", layer) for layer in layers})


def binds(target: str, layer: str) -> bool:
    return f".{layer}".endswith(f".{target}")
