"""Where a LoRA binds: the linear layers whose names end in one of its targets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from common.errors import ModelError


def require_bound(targets: Sequence[str], layers: Collection[str]) -> None:
    """A target that binds to nothing is a misspelling that peft would pass over if another one binds.

    Raises:
        ModelError: there is one.
    """
    unbound = [target for target in targets if not any(binds(target, layer) for layer in layers)]
    if unbound:
        raise ModelError(f"lora.targets {unbound} bind to no module: no linear layer's name ends so")


def binds(target: str, layer: str) -> bool:
    return f".{layer}".endswith(f".{target}")
