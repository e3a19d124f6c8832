"""Quick commands that the documents show, run as they stand: help, forecasts, the page of settings and a dry run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.document_commands import PROJECT_ROOT, Shown, shown_commands
from tests.unit.project.test_documents import DOCUMENTS

QUICK = ("--help", "forecast", "learner.preflight.configuration_page", "--explain", "--dry-run")
SLOW = {"--dry-run", "generate", "evaluate", "export"}
"""They start Ray, or import torch and diffusers to print their help."""
TIMEOUT = 280.0


def quick_commands() -> list[tuple[str, ...]]:
    """Each once; those whose run file is only an example's are left out."""

    def runs(shown: Shown) -> bool:
        words = shown.words
        named = words[words.index("--config") + 1] if "--config" in words else None
        return shown.whole and not {*QUICK}.isdisjoint(words) and (named is None or Path(PROJECT_ROOT, named).is_file())

    shown = {one.words for path in DOCUMENTS for one in shown_commands(path) if runs(one)}
    return sorted(shown | {("rtdmd", "--help")})


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words), marks=[] if SLOW.isdisjoint(words) else [pytest.mark.slow])
        for words in quick_commands()
    ],
)
def test_a_quick_command_does_what_the_document_says(words: tuple[str, ...]) -> None:
    start = ("-m", "learner.commands") if words[0] == "rtdmd" else ()
    done = subprocess.run(
        [sys.executable, *start, *words[1:]],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr


def test_help_forecast_and_dry_run_are_among_them() -> None:
    words = {word for command in quick_commands() for word in command}
    assert {"--help", "forecast", "--dry-run", "learner.preflight.configuration_page"} <= words
