"""Blocks of a transformer: its repeated parts, which are sharded and compiled one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch._inductor.config
from torch import nn

COMPILED_VARIANTS = 256
"""Limit of compiled variants per process: kinds of block, times networks, times shapes.

Beyond it torch would silently run uncompiled code.
"""


def blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    """The members of the module lists among its children, as in diffusers' transformers."""
    for part in transformer.children():
        if isinstance(part, nn.ModuleList):
            yield from part


def compile_blocks(transformers: Iterable[nn.Module]) -> None:
    """Compile every block on first use: once per kind of block, network and kind of shape.

    Weights and active adapters may change afterwards.
    """
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    # Round after every operation, as uncompiled code does: the learner attests what the workers compute.
    torch._inductor.config.emulate_precision_casts = True
    for transformer in transformers:
        for block in blocks(transformer):
            block.compile()
