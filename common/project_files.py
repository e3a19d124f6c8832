"""Finds the files that come with the project: run files, prompts and the shapes world.

They are beside the packages, both in the repository and in an installed wheel. A relative path is looked up first in
the working directory and then here, so `rtdmd train` works from any directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from common.config.section import Section

PROJECT_ROOT = Path(__file__).resolve().parents[1]
"""Root of the repository, or the directory into which a wheel was installed."""
AnySection = TypeVar("AnySection", bound=Section)


def found_path(path: Path) -> Path:
    """A relative path from the working directory, or else from the project; unchanged if it is in neither."""
    return PROJECT_ROOT / path if not path.exists() and (PROJECT_ROOT / path).exists() else path


def with_found_paths(section: AnySection) -> AnySection:
    """The section with `found_path` applied to every path in it."""
    found = {name: _found(value) for name, value in section}
    changed = {name: value for name, value in found.items() if value != vars(section)[name]}
    return section.model_copy(update=changed) if changed else section


def _found(value: object) -> object:
    if isinstance(value, Path):
        return found_path(value)
    if isinstance(value, Section):
        return with_found_paths(value)
    if isinstance(value, tuple):
        return tuple(_found(entry) for entry in value)
    return value
