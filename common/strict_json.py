"""JSON as the standard has it, for prompts and metadata: what is read here can be written as JSON and as msgpack.

Python's reader also takes NaN and Infinity, turns 1e999 into infinity, takes the last of two equal keys, and raises
four kinds of error.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
"""Integers beyond 64 bits, signed or unsigned, cannot be sent to a reward server; parquet has none."""
MAX_QUOTED = 24
"""An error quotes this many characters of a number."""


def parse(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text; ValueError with the reason for everything else."""
    try:
        return json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_integer, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:MAX_QUOTED]!r} is given twice")
            seen.add(name)
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON: leave it out or write null")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:MAX_QUOTED]} is too large")
    return value


def _integer(text: str) -> int:
    # Python refuses to read thousands of digits; 20 are enough to know.
    if len(text) > 20 or not MIN_INTEGER <= (value := int(text)) <= MAX_INTEGER:
        raise ValueError(f"the number {text[:MAX_QUOTED]} has more than 64 bits: write it as text")
    return value
