"""Credentials of the environment, read in one way: tokens, users and passwords."""

from __future__ import annotations


def credential(text: str | None) -> str | None:
    """The text without whitespace at its ends, which files and editors leave there; None if nothing is left."""
    return (text or "").strip() or None
