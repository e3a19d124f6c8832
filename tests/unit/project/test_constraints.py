"""constraints.txt locks every requirement of the environment in the version that pyproject.toml pins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8")
EXTRAS = ("core", "parquet", "rewards", "serving", "ocr", "dev")
UNHASHED = "torch"
"""Installed first and by itself: its CPU build has other hashes."""


def installed() -> dict[str, str]:
    """Name -> version of every package in constraints.txt."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", CONSTRAINTS, re.MULTILINE))


def requirements() -> list[str]:
    of_extras = [requirement for extra in EXTRAS for requirement in PROJECT["optional-dependencies"][extra]]
    ours = ("rtdmd[", f"{UNHASHED}==")
    return [one for one in (*PROJECT["dependencies"], *of_extras) if not one.startswith(ours)]


@pytest.mark.parametrize("requirement", sorted(set(requirements())))
def test_a_requirement_is_locked_in_the_version_that_is_pinned(requirement: str) -> None:
    name, version = re.match(r"([A-Za-z0-9-]+)(?:\[\w+\])?(?:==([^\s;]+))?", requirement).groups()
    locked = installed().get(name.lower())
    assert locked is not None, "run `make constraints`"
    assert version in (None, locked), "run `make constraints`"


def test_every_package_has_hashes_and_none_is_torch_or_names_an_index() -> None:
    entries = re.split(r"\n(?=[a-z0-9-]+==)", CONSTRAINTS)[1:]
    assert len(entries) > 100
    assert [entry.partition(" ")[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert not {name for name in installed() if name == UNHASHED or name.startswith(("nvidia", "triton"))}
    assert not re.search(r"^--|://", CONSTRAINTS, re.MULTILINE)


def test_the_makefile_pins_torch_as_the_project_does() -> None:
    pins = {pin for extra in ("core", "rewards") for pin in PROJECT["optional-dependencies"][extra] if "torch==" in pin}
    assert len(pins) == 1
    assert f"pip install --quiet {pins.pop()}\n" in (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
