"""The blocks of a transformer: what it repeats, and so what is sharded and compiled one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch._inductor.config
from torch import nn

COMPILED_VARIANTS = 256
"""Kinds of block, times networks, times shapes, of a process. Beyond that torch would go on uncompiled."""


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
    # Rounded after every operation, as without compiling: the learner attests what the workers compute.
    torch._inductor.config.emulate_precision_casts = True
    for transformer in transformers:
        for block in blocks(transformer):
            block.compile()
