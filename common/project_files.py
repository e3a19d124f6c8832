"""Finds the files that come with the project: run files, prompts, the shapes world, and the code itself.

They are beside the packages, both in the repository and in an installed wheel. A relative path is looked up first in
the working directory and then here, so `rtdmd train` works from any directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from common.config.section import Section

PROJECT_ROOT = Path(__file__).resolve().parents[1]
"""Root of the repository, or the directory into which a wheel was installed."""
AnySection = TypeVar("AnySection", bound=Section)


def python_command(module: str) -> list[str]:
    """Command that runs a module of the project: `-P` keeps a package in the current directory from taking its place.

    It needs `python_environment`.
    """
    return [sys.executable, "-P", "-m", module]


def python_environment() -> dict[str, str]:
    """Our environment, with the project first on Python's search path, also for a process's own processes."""
    search_path = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(search_path)}


def import_own(module: str) -> ModuleType:
    """Import a module that a user names. It may be in the current directory, which is searched if it is nowhere else.

    So a folder in that directory which has a library's name, such as `triton`, does no harm to runs whose modules are
    all ours.
    """
    if find_spec(module.partition(".")[0]) is None:
        sys.path.append(os.getcwd())
    return import_module(module)


def found_path(path: Path, beside: Sequence[Path] = ()) -> Path:
    """A relative path from the working directory, else from the project, else from one of the folders `beside`.

    Unchanged if it is in none of them.
    """
    places = [path, *(root / path for root in (PROJECT_ROOT, *beside))]
    return next((place for place in places if place.exists()), path)


def with_found_paths(section: AnySection, beside: Sequence[Path] = ()) -> AnySection:
    """The section with `found_path` applied to every path in it."""
    found = {name: _found(value, beside) for name, value in section}
    changed = {name: value for name, value in found.items() if value != vars(section)[name]}
    return section.model_copy(update=changed) if changed else section


def _found(value: object, beside: Sequence[Path]) -> object:
    if isinstance(value, Path):
        return found_path(value, beside)
    if isinstance(value, Section):
        return with_found_paths(value, beside)
    if isinstance(value, tuple):
        return tuple(_found(entry, beside) for entry in value)
    return value
