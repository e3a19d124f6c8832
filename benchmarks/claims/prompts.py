"""Finds the prompts of a final table on which nothing was trained or tuned."""

from __future__ import annotations

from functools import cache
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def own_rows(texts: list[str], first: int, trained: set[str]) -> list[int]:
    """The rows of `texts[first:]` that occur neither before, nor among the trained texts."""
    seen = set(trained) | set(texts[:first])
    rows = []
    for row, text in enumerate(texts[first:]):
        if text not in seen:
            rows.append(row)
        seen.add(text)
    return rows


@cache
def own_rows_of(evaluation: str, train: str, first: int) -> tuple[int, ...]:
    """`own_rows` of the project's prompt files."""
    texts = (PROJECT_ROOT / evaluation).read_text(encoding="utf-8").splitlines()
    return tuple(own_rows(texts, first, set((PROJECT_ROOT / train).read_text(encoding="utf-8").splitlines())))
