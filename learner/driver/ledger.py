"""The ledger of a run: one line in `ledger.jsonl` for the end of every group of stage 2.

A group is named by its iteration and its prompt. A resumed run repeats iterations, so their lines are removed first: in
the end every group has one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from common.group_ends import GroupEnd
from common.types import Position, Stage
from common.whole_files import write_whole
from learner.records.line_file import LineFile

LEDGER = "ledger.jsonl"


class Ledger:
    """Appends to the ledger of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.lines = LineFile(run_dir / LEDGER)

    def record(self, ends: Iterable[GroupEnd]) -> None:
        """Write the ends of an iteration's groups, once it has been trained."""
        self.lines.append("".join(_line(end) for end in ends))


def cut_ledger(run_dir: Path, position: Position) -> None:
    """Remove the lines of iterations that a resumed run will repeat, and an incomplete last line."""
    path = run_dir / LEDGER
    if not path.exists():
        return
    done = position.iteration if position.stage is Stage.ALIGNMENT else 0
    kept = [line for line in path.read_bytes().split(b"\n") if _iteration(line, done) < done]
    write_whole(path, b"".join(line + b"\n" for line in kept))


def _line(end: GroupEnd) -> str:
    fields = {
        "iteration": end.iteration,
        "prompt": end.prompt,
        "outcome": end.outcome,
        "worker": end.worker,
        "attempts": end.attempts,
        "cause": end.cause,
    }
    return json.dumps(fields) + "\n"


def _iteration(line: bytes, otherwise: int) -> int:
    """The iteration that a line tells of; `otherwise` if the line is damaged."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return otherwise
