"""Prompts in parquet: a text column "prompt"; every other column is metadata, like the other keys of a .jsonl line.

The row numbers of pandas are no metadata.

A column has one type and a value in every row; JSON keys need neither. A null means an absent key (GenEval's objects
have a colour only if one is demanded). Values that fit no column type (its position ["left of", 0]) may be JSON in a
text column "metadata", whose keys are merged with the others.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import strict_json
from common.errors import PromptError, one_line
from common.metadata import without_nulls
from common.visible_text import trimmed

INDEX = re.compile(r"__index_level_\d+__")
"""The column in which pandas keeps the row numbers of a table that was filtered."""
PROMPT, METADATA = "prompt", "metadata"
NOT_CONVERTED = (ValueError, OverflowError, TypeError, NotImplementedError)
"""Errors of pyarrow for a value that is no text in UTF-8, a date beyond Python's, or of a type that Python lacks."""


def read_parquet(path: Path, text_column: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Position in the file, text and metadata of every row; a row whose prompt is null or blank is an error.

    With `text_column`, the text is in that column, and no other is read: some files have pictures beside it.

    Raises:
        PromptError: pyarrow is not installed, the file is missing or not parquet, or a row is not a prompt.
    """
    if not os.path.isfile(path):
        raise PromptError(f"{path}: no such prompt file (looked for it from {Path.cwd()})")
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PromptError(
            f"{path}: to read parquet, pyarrow is needed: pip install -e '.[parquet]', or write the prompts as .jsonl"
        ) from error
    try:
        # partitioning=None: a folder name such as "tag=colors/" in the path must not become a column.
        columns = None if text_column is None else [text_column]
        if text_column is not None and text_column not in (names := parquet.read_schema(path).names):
            raise PromptError(f'{path} has no column "{text_column}"; its columns are {", ".join(names)}')
        table = parquet.read_table(path, partitioning=None, columns=columns)
        table = table.drop_columns([name for name in table.column_names if INDEX.fullmatch(name)])
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise PromptError(f"{path}: not a parquet file that can be read: {one_line(error)}") from error
    for number, row in enumerate(_rows(path, table), start=1):
        text, metadata = _prompt(f"{path}: row {number}", row, text_column or PROMPT)
        yield f"row {number}", text, metadata


def _rows(path: Path, table: Any) -> list[dict[str, Any]]:
    """All rows of a pyarrow table; PromptError names the first with a value that Python has no type for."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    except NOT_CONVERTED as error:
        number, reason = next(_unreadable(table), (0, error))
        raise PromptError(f"{path}: row {number} cannot be read: {one_line(reason)}") from error


def _unreadable(table: Any) -> Iterator[tuple[int, Exception]]:
    for number in range(table.num_rows):
        try:
            table.slice(number, 1).to_pylist()
        except NOT_CONVERTED as error:
            yield number + 1, error


def _prompt(where: str, row: dict[str, Any], column: str) -> tuple[str, dict[str, Any]]:
    if column not in row:
        raise PromptError(f'{where} has no column "{column}"; rename one of its columns: {", ".join(row)}')
    text = row.pop(column)
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        raise PromptError(f'{where} has a {kind} in "{column}", which is no text: write what to draw in that column')
    if text is None or not trimmed(text):
        raise PromptError(f'{where} has no "{column}" text; its columns are {", ".join([column, *row])}')
    metadata = without_nulls(row)
    extra = metadata.get(METADATA)
    if isinstance(extra, str):
        del metadata[METADATA]
        metadata |= without_nulls(_parsed(where, extra))
    return text, metadata


def _parsed(where: str, text: str) -> dict[str, Any]:
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise PromptError(f'{where}: its "{METADATA}" is text, but not JSON: {error}') from error
    if not isinstance(value, dict):
        raise PromptError(f'{where}: its "{METADATA}" is JSON, but no object: {text[:40]}')
    return value
