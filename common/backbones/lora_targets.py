"""Targets of a LoRA: it binds to the linear layers whose names end in one of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from common.errors import ModelError


def require_bound(targets: Sequence[str], layers: Collection[str]) -> None:
    """Require that every target binds: a misspelt one would go unnoticed as long as another binds.

    Raises:
        ModelError: a target binds to no layer.
    """
    unbound = [target for target in targets if not any(binds(target, layer) for layer in layers)]
    if unbound:
        raise ModelError(f"lora.targets {unbound} bind to no module: no linear layer's name ends so")


def adapted_layers(state: Iterable[str]) -> tuple[str, ...]:
    """The layers of an adapter with these weights (`LAYER.lora_A.weight`, `LAYER.lora_B.weight`)."""
    return tuple(sorted({key.rpartition(".lora_")[0] for key in state}))


def suffixes(layers: Iterable[str]) -> list[str]:
    """The targets that bind to these layers in every block: `blocks.3.attn.to_q` becomes `attn.to_q`."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", layer) for layer in layers})


def binds(target: str, layer: str) -> bool:
    return f".{layer}".endswith(f".{target}")
