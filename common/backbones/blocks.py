"""The blocks of a transformer: what it repeats, and so what is sharded and compiled one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

COMPILED_VARIANTS = 64
"""Of a kind of block: networks times shapes. Beyond that torch would go on uncompiled."""


def blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    """What the lists among its children hold, as diffusers' transformers are built."""
    for part in transformer.children():
        if isinstance(part, nn.ModuleList):
            yield from part


def compile_blocks(transformers: Iterable[nn.Module]) -> None:
    """Have every block compiled when it is first met: once for each kind of block, network and kind of shape.

    Weights may change afterwards, and which adapters are active.
    """
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    for transformer in transformers:
        for block in blocks(transformer):
            block.compile()
