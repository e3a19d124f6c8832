"""Operations of one pass of a transformer, counted from the names and shapes of its weights.

Not every token passes through every weight. Image tokens go through the image stream and prompt tokens through the text
stream; the later blocks of FLUX process both together; modulation weights process one vector per sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

ONCE_A_SAMPLE = re.compile(r"(^|\.)(norm\w*|time\w*|\w*modulation\w*)\.")
TEXT_STREAM = re.compile(r"(^|\.)(context_embedder|ff_context|add_[qkv]_proj|to_add_out)\.")
BOTH_STREAMS = re.compile(r"^single_transformer_blocks\.")
IMAGE_ATTENTION = re.compile(r"\.attn2\.to_q\.weight$")


def forward_flops(shapes: Shapes, layers: int, width: int, image_tokens: int, text_tokens: int) -> float:
    """Operations per sample: two per weight and token that passes it, plus attention; adapters are not counted.

    Args:
        shapes: shape of every weight, by its name in diffusers' SD3, FLUX.1 or FLUX.2 transformer.
        layers: number of blocks whose attention covers both streams.
        width: hidden units per token.
    """
    tokens = image_tokens + text_tokens
    linear = sum(
        math.prod(shape) * _tokens_through(name, image_tokens, text_tokens)
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    )
    # SD3.5 has a second attention in some blocks, over the image alone.
    image_alone = sum(1 for name in shapes if IMAGE_ATTENTION.search(name))
    return 2.0 * linear + 4.0 * width * (layers * tokens**2 + image_alone * image_tokens**2)


def _tokens_through(name: str, image_tokens: int, text_tokens: int) -> int:
    if ONCE_A_SAMPLE.search(name):
        return 1
    if TEXT_STREAM.search(name):
        return text_tokens
    return image_tokens + text_tokens if BOTH_STREAMS.match(name) else image_tokens
