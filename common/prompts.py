"""Prompt files: .txt with one prompt per line, .jsonl with {"prompt": text, ...metadata} per line, or .parquet with a
column "prompt" and columns of metadata (see `parquet_prompts`).

Special tokens such as <|endoftext|> or </s> are plain text here; the text encoders escape them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import PromptError, RewardRejected
from common.parquet_prompts import read_parquet
from common.rewards.api import check_text_lengths
from common.types import Prompt

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 20_000  # far more than any text encoder reads: a longer line is a damaged file, not a prompt
MAX_LINE_BYTES = 1_000_000  # leaves room for a .jsonl line's metadata
TRUNCATION_NOTE_CHARACTERS = 2_000  # more than the 512 tokens of the longest encoder can hold


def load_prompts(path: Path) -> list[Prompt]:
    """Load all prompts of a file, in order; `Prompt.index` counts them. Blank lines are skipped.

    Raises:
        PromptError: the file is missing, empty, binary, of another kind, or has a line that is not a prompt.
    """
    prompts: list[Prompt] = []
    for where, text, metadata in _records(path):
        if len(text) > MAX_CHARACTERS:
            raise PromptError(
                f"{path}: {where} is a prompt of {len(text):,} characters, the limit is {MAX_CHARACTERS:,}: "
                "shorten it, or put one prompt on each line"
            )
        try:
            check_text_lengths([text], [metadata])
        except RewardRejected as error:
            raise PromptError(f"{path}: {where} is not accepted by reward servers: {error}") from error
        if len(text) > TRUNCATION_NOTE_CHARACTERS:
            logger.warning(
                "%s: %s has %d characters; the text encoder reads only its first tokens", path, where, len(text)
            )
        prompts.append(Prompt(index=len(prompts), text=text, metadata=metadata))
    if not prompts:
        raise PromptError(f"{path}: no prompts in it; write one on each line")
    return prompts


def _records(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Position in the file, text and metadata of every prompt."""
    if path.suffix == ".parquet":
        yield from read_parquet(path)
        return
    for number, line in _lines(path):
        text, metadata = _parse_line(path, number, line)
        yield f"line {number}", text, metadata


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every non-blank line; of an overlong line only the limit is read."""
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptError(f"{path}: a prompt file is .txt, .jsonl or .parquet, not {path.suffix or 'without a suffix'}")
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield from _decoded(path, number, raw)
    except FileNotFoundError as error:
        raise PromptError(f"{path}: no such prompt file (looked for it from {Path.cwd()})") from error
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from error


def _decoded(path: Path, number: int, raw: bytes) -> Iterator[tuple[int, str]]:
    if b"\0" in raw:
        raise PromptError(f"{path}: line {number} has a NUL byte: this is a binary file, not a list of prompts")
    if len(raw) > MAX_LINE_BYTES:
        raise PromptError(
            f"{path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes (the file has {path.stat().st_size:,}); "
            f"a prompt has at most {MAX_CHARACTERS:,} characters: put one on each line"
        )
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path}: line {number} is not UTF-8 (byte {error.start}): binary or another encoding"
        ) from error
    if text:
        yield number, text


def _parse_line(path: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    """Text and metadata of one line."""
    if path.suffix == ".txt":
        return line, {}
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptError(f"{path}: line {number} is not JSON: {error}") from error
    text = record.pop("prompt", None) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f'{path}: line {number} has no "prompt" text; a line is {{"prompt": "a red circle", ...}}')
    return text.strip(), record
