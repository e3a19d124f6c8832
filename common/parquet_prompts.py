"""Prompts in parquet: a text column "prompt"; every other column is metadata, like the other keys of a .jsonl line.

A column has one type and a value in every row; JSON keys need neither. So nulls are dropped at any depth (GenEval's
objects have a colour only if one is demanded). Values that fit no column type (its position ["left of", 0]) may be JSON
in a text column "metadata", whose keys are merged with the others.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import PromptError, one_line

PROMPT, METADATA = "prompt", "metadata"


def read_parquet(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Position in the file, text and metadata of every row; a row whose prompt is null or blank is an error.

    Raises:
        PromptError: pyarrow is not installed, the file is missing or not parquet, or a row is not a prompt.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PromptError(
            f"{path}: to read parquet, pyarrow is needed: pip install -e '.[parquet]', or write the prompts as .jsonl"
        ) from error
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file (looked for it from {Path.cwd()})")
    try:
        # partitioning=None: a folder name such as "tag=colors/" in the path must not become a column.
        rows = parquet.read_table(path, partitioning=None).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
        raise PromptError(f"{path}: not a parquet file that can be read: {one_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        text, metadata = _prompt(f"{path}: row {number}", row)
        yield f"row {number}", text, metadata


def _prompt(where: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    text = row.pop(PROMPT, None)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f'{where} has no "{PROMPT}" text; its columns are {", ".join([PROMPT, *row])}')
    metadata = _without_nulls(row)
    extra = metadata.get(METADATA)
    if isinstance(extra, str):
        metadata = {key: value for key, value in metadata.items() if key != METADATA} | _parsed(where, extra)
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"{where} has metadata that JSON cannot represent: {error}; make it text or a number"
        ) from error
    return text.strip(), metadata


def _parsed(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise PromptError(f'{where}: its "{METADATA}" is text, but not JSON: {error}') from error
    if not isinstance(value, dict):
        raise PromptError(f'{where}: its "{METADATA}" is JSON, but no object: {text[:40]}')
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value if item is not None]
    return value
