"""Finds the unit tests that can reach a source file: through their imports, direct or not, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.mutants.mutant import REPOSITORY

UNIT_TESTS = "tests/unit"
IMPORT_PATH = re.compile(r"([a-z_]\w*(?:\.\w+)+):\w+")
"""The form in which the sources name a class that is imported on demand."""
FIXTURES = {"tiny_pipeline": "tests.helpers.tiny_pipeline", "cached": "tests.helpers.tiny_pipeline"}
"""Modules that the fixtures of tests/conftest.py import."""


def reaching_tests(file: str) -> list[str]:
    """The files of unit tests that import the file, relative to the repository."""
    return [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / UNIT_TESTS).rglob("test_*.py"))
        if REPOSITORY / file in _reached(path)
    ]


def _reached(start: Path) -> set[Path]:
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return found


@cache
def _imported(path: Path) -> list[Path]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    modules = {name for node in nodes for name in _names(node)}
    return [source for module in sorted(modules) if (source := _source(module)) is not None]


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from IMPORT_PATH.findall(node.value)
        yield FIXTURES.get(node.value, "")
    elif isinstance(node, ast.arg):
        yield FIXTURES.get(node.arg, "")


def _source(module: str) -> Path | None:
    base = REPOSITORY.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
