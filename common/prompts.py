"""Prompt files: .txt with one prompt per line, .jsonl with {"prompt": text, ...metadata} per line, or .parquet with a
column "prompt" and columns of metadata (see `parquet_prompts`). The ending may be in capitals.

A prompt is text, and its metadata is what JSON can represent, where null means an absent key: both are checked for the
whole file before anything starts, with the file and the line. Special tokens such as <|endoftext|> or </s> are plain
text here; the text encoders escape them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from common import git_lfs, strict_json
from common.errors import PromptError, RewardRejected, WireError
from common.metadata import without_nulls
from common.parquet_prompts import METADATA, PROMPT, read_parquet
from common.prompt_shards import whole_set
from common.rewards.api import check_texts
from common.types import Prompt
from common.visible_text import trimmed
from common.wire import pack, unpack

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 20_000  # far more than any text encoder reads: a longer line is a damaged file, not a prompt
MAX_LINE_BYTES = 1_000_000  # leaves room for a .jsonl line's metadata
TRUNCATION_NOTE_CHARACTERS = 2_000  # more than the 512 tokens of the longest encoder can hold
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
OTHER_LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""Some programs end a line with these, others have them in a line: a .txt file must say which it means."""

CONTROL = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
"""Control characters that are no white space: escapes of a terminal, or text in another encoding."""
OTHER_FILES = {"{\\rtf": "RTF", "<!doctype": "an HTML page", "<html": "an HTML page", "<?xml": "XML"}
"""The beginnings, in lower case, of text files that are no lists of prompts; no prompt begins so."""


def load_prompts(path: Path, text_key: str | None = None) -> list[Prompt]:
    """Load all prompts of a file, or of a directory of shards, in order; `Prompt.index` counts them. Blank lines are
    skipped.

    With `text_key`, that key of a .jsonl line or column of a .parquet file has the text, and there is no metadata.

    Raises:
        PromptError: the file is missing, empty, binary, of another kind, or has a line that is not a prompt.
    """
    if "\0" in str(path):
        raise PromptError(f"{str(path)!r}: a path cannot have a NUL character: name the prompt file")
    prompts: list[Prompt] = []
    for file in whole_set(path):
        for where, text, metadata in _records(file, text_key):
            prompts.append(_checked(f"{file}: {where}", len(prompts), text, metadata))
    if not prompts:
        raise PromptError(f"{path}: no prompts in it; write one on each line")
    return prompts


def prompts_of(texts: Sequence[str], option: str) -> list[Prompt]:
    """Prompts from a command line, checked as those of a file; `option` names where they are from."""
    prompts = []
    for index, text in enumerate(texts):
        if not trimmed(text):
            raise PromptError(f"{option} is empty: say what to draw")
        prompts.append(_checked(f"{option} {index + 1}", index, text, {}))
    return prompts


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of texts and metadata, in their order."""
    content = [[prompt.text, prompt.metadata] for prompt in prompts]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _checked(where: str, index: int, text: str, metadata: Mapping[str, Any]) -> Prompt:
    text = trimmed(text)
    if len(text) > MAX_CHARACTERS:
        raise PromptError(
            f"{where} is a prompt of {len(text):,} characters, the limit is {MAX_CHARACTERS:,}: "
            "shorten it, or put one prompt on each line"
        )
    if control := CONTROL.search(text):
        raise PromptError(f"{where} has the control character U+{ord(control[0]):04X}: it is no text, write it anew")
    try:
        check_texts([text], [metadata])
    except RewardRejected as error:
        raise PromptError(f"{where} is not accepted by reward servers: {error}") from error
    metadata = _unnested(where, without_nulls(metadata))
    if metadata:
        _check_metadata(where, metadata)
    if len(text) > TRUNCATION_NOTE_CHARACTERS:
        logger.warning("%s has %d characters; the text encoder reads only its first tokens", where, len(text))
    return Prompt(index=index, text=text, metadata=metadata)


OF_SCORES = ("index", "scores")
"""Keys of `scores.jsonl` that are no metadata of a prompt."""


def _unnested(where: str, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata whose own key "metadata" has a mapping, as `scores.jsonl` has it: merged with the other keys."""
    inner = metadata.get(METADATA)
    if not isinstance(inner, Mapping):
        return metadata
    outer = {key: value for key, value in metadata.items() if key not in (METADATA, *OF_SCORES)}
    twice = sorted(key for key in outer.keys() & inner.keys() if outer[key] != inner[key])
    if twice:
        raise PromptError(f'{where} has {twice[0]!r} twice, beside "metadata" and in it: leave one out')
    return outer | dict(inner)


def _check_metadata(where: str, metadata: Mapping[str, Any]) -> None:
    """PromptError unless it can be written as JSON, as evaluations do, and sent to a reward server."""
    for key, value in metadata.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(
                f"{where} has metadata that JSON cannot represent, {key!r}: {error}; leave it out, or make it text or "
                "a number"
            ) from error
    try:
        unpack(pack({"metadata": metadata}))
    except WireError as error:
        raise PromptError(f"{where} has metadata that cannot be sent to a reward server: {error}") from error


def _records(path: Path, text_key: str | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Position in the file, text and metadata of every prompt."""
    if os.path.isfile(path) and os.access(path, os.R_OK) and git_lfs.is_pointer(path):
        raise PromptError(f"{path} {git_lfs.REMEDY}")
    if path.suffix.lower() == ".parquet":
        yield from read_parquet(path, text_key)
        return
    for number, line in _lines(path):
        text, metadata = _parse_line(path, number, line, text_key)
        yield f"line {number}", text, metadata


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every non-blank line; of an overlong line only the limit is read."""
    if path.suffix.lower() not in (".txt", ".jsonl"):
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
    if number == 1 and raw.startswith(BYTE_ORDER_MARKS):
        raise PromptError(f"{path}: line 1 begins as UTF-16 does: save the file as UTF-8")
    if b"\0" in raw:
        raise PromptError(
            f"{path}: line {number} has a NUL byte: this is a binary file or UTF-16, not a list of prompts in UTF-8"
        )
    if len(raw) > MAX_LINE_BYTES:
        raise PromptError(
            f"{path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes (the file has {path.stat().st_size:,}); "
            f"a prompt has at most {MAX_CHARACTERS:,} characters: put one on each line"
        )
    try:
        # A byte-order mark also begins a line where two files were joined.
        text = trimmed(raw.decode())
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: line {number} is not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    if text:
        yield number, text


def _parse_line(path: Path, number: int, line: str, text_key: str | None) -> tuple[str, dict[str, Any]]:
    """Text and metadata of one line."""
    # In .jsonl only a bare carriage return ends lines: the others are text within quotes.
    for mark in OTHER_LINE_ENDS if path.suffix.lower() == ".txt" else "\r":
        if mark in line:
            raise PromptError(
                f"{path}: line {number} has a U+{ord(mark):04X} in it, which some programs read as the end of a line: "
                "end lines with a line feed, or write a space"
            )
    if path.suffix.lower() == ".txt":
        _require_plain_text(path, number, line)
        return line, {}
    try:
        record = strict_json.parse(line)
    except ValueError as error:
        raise PromptError(f"{path}: line {number} is not JSON: {error}") from error
    key = text_key or PROMPT
    text = record.pop(key, None) if isinstance(record, dict) else None
    if not isinstance(text, str) or not trimmed(text):
        raise PromptError(f'{path}: line {number} has no "{key}" text; a line is {{"{key}": "a red circle", ...}}')
    return text, record if text_key is None else {}


def _require_plain_text(path: Path, number: int, line: str) -> None:
    """PromptError if a line of a .txt file shows that the file is of another kind."""
    for beginning, kind in OTHER_FILES.items():
        if line.lower().startswith(beginning):
            raise PromptError(f"{path}: line {number} begins as {kind} does: save it as text, one prompt on each line")
    try:
        is_object = line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return
    if is_object:
        raise PromptError(f"{path}: line {number} is JSON, which only a file named .jsonl may hold: rename the file")
