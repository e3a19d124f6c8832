"""Checks of a pipeline's tokenizers that need only their small files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xxhash

from common.backbones.files.pipeline_files import PipelineFiles
from common.wire import fingerprint

CHAT_TEMPLATE = "chat_template.jinja"
CLIP_POSITIONS = 77
"""Positions of a CLIP text encoder whose configuration does not name them."""


def clip_tokens(files: PipelineFiles, encoders: Sequence[str]) -> int:
    """Number of tokens to which the pipeline pads a prompt for its CLIP text encoders.

    Raises:
        ModelError: the tokenizer names no number that the encoders have positions for; transformers writes 1e30 for a
            tokenizer without a limit.
    """
    length = files.config("tokenizer")["model_max_length"]
    positions = min(files.config(part).get("max_position_embeddings", CLIP_POSITIONS) for part in encoders)
    if not isinstance(length, int) or not 1 <= length <= positions:
        raise files.broken(
            f"tokenizer/tokenizer_config.json has model_max_length = {length}, but its {' and '.join(encoders)} can "
            f"read {positions} tokens: write {positions} there"
        )
    return length


def require_chat_template(files: PipelineFiles) -> None:
    """ModelError unless the tokenizer has the template that a prompt is put into."""
    file = files.directory / "tokenizer" / CHAT_TEMPLATE
    if not file.is_file() and not files.config("tokenizer").get("chat_template"):
        raise files.broken(
            f"there is no tokenizer/{CHAT_TEMPLATE} in it, nor a chat_template in tokenizer_config.json, and a "
            f"{files.kind} puts prompts into one: copy it from the published model"
        )


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of a tokenizer's files."""
    return fingerprint(
        {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
    )
