"""Pointers of Git LFS: a clone without git-lfs has such a text file in the place of each large file."""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
REMEDY = "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"


def is_pointer(path: Path) -> bool:
    """Whether the file at `path` is a pointer; OSError as for any file that is read."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER
