"""A prompt's metadata, for scorers that need more than the text. A null means an absent key.

Tables have a value in every row, so programs that write one (parquet, or jsonl from Hugging Face's `datasets`) fill up
with nulls. Prompt files of every format and requests to reward servers pass through `without_nulls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_nulls(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of metadata without the nulls in it and in its lists and maps, which become new lists and dicts."""
    whole: dict[str, Any] = {}
    # Not recursive, because JSON may be nested deeply.
    left: list[tuple[Any, Any]] = [(metadata, whole)]
    while left:
        source, copy = left.pop()
        for key, item in source.items() if isinstance(source, Mapping) else enumerate(source):
            if item is None:
                continue
            kept = _empty(item)
            if kept is not item:
                left.append((item, kept))
            if isinstance(copy, dict):
                copy[key] = kept
            else:
                copy.append(kept)
    return whole


def _empty(item: Any) -> Any:
    """An empty dict or list for a map or a list; any other value is returned as it is."""
    if isinstance(item, Mapping):
        return {}
    return [] if isinstance(item, list | tuple) else item
