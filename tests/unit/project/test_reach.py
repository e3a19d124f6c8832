"""Imports of each package: the light ones do not import torch, so that commands respond at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from learner.records.trackers.protocol import CLASSES

PROJECT_ROOT = Path(__file__).resolve().parents[3]
LIGHT_ROOMS = ("learner/preflight", "learner/records", "learner/driver")
OF_THE_LEARNERS_PROCESS = "learner.driver.learner_group"
"""The one file of the driver that makes the learner's process, whose class it must import."""
OF_A_TRACKER = {path.partition(":")[0] for path in CLASSES.values()}
"""Each imports the tracker's package, which may be missing."""


def modules(rooms: tuple[str, ...]) -> list[str]:
    files = [path.relative_to(PROJECT_ROOT) for room in rooms for path in (PROJECT_ROOT / room).rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    return sorted(set(names) - {OF_THE_LEARNERS_PROCESS} - OF_A_TRACKER)


def loaded_by(names: list[str]) -> set[str]:
    """Top-level modules in a fresh process that has imported these."""
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("names", "unreached"),
    [
        (modules(LIGHT_ROOMS), {"torch", "diffusers", "transformers"}),
        (modules(LIGHT_ROOMS[:2]), {"torch", "ray", "diffusers", "transformers"}),
        (["learner.checkpoint", "learner.loop", "learner.metric_names"], {"torch", "diffusers", "transformers"}),
    ],
    ids=["light rooms", "before and after a run", "the loop"],
)
def test_a_light_room_reaches_no_heavy_library(names: list[str], unreached: set[str]) -> None:
    assert len(names) > 2
    assert loaded_by(names) & unreached == set()
