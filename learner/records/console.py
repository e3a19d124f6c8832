"""Console output of a run: a live table on a terminal, else one plain line per step.

    with Console(total=100, title="shapes") as console:
        console.update({"reward/hps": 0.27, "seconds/rollout": 1.3}, stage="alignment", iteration=7)
        console.message("checkpoint written")

The part of a metric's name before the first slash is its group ("reward", "loss", "seconds", "evaluation").
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_CHARACTERS = 160
"""Longest line of an iteration where there is no terminal. `metrics.jsonl` has every figure."""
UNKNOWN_WIDTH = 80
FIRST = (
    "seconds/step",
    "reward/",
    "loss/teacher_distance",
    "loss/fake_score_loss",
    "loss/clipped_fraction",
    "loss/student_gradient_norm",
    "loss/fake_gradient_norm",
    "loss/dropped_groups",
)
"""Beginnings of the names that such a line shows, the most important first."""


class Console:
    """Progress of one stage after another.

    Args:
        total: iterations of all stages together, for the progress display; updates are counted.
        title: usually the run's name.
        stream: where to write; a terminal gets the live table.
    """

    def __init__(self, total: int, title: str, stream: TextIO | None = None) -> None:
        self._total = total
        self._title = title
        self._rich = RichConsole(file=stream or sys.stdout)
        if self._rich.width < 1:  # COLUMNS=0, as a serial console gives it: nothing would be shown
            self._rich.width = UNKNOWN_WIDTH
        self._live = Live(console=self._rich, refresh_per_second=4, transient=False) if self._rich.is_terminal else None
        self._stage = ""
        self._latest: dict[str, float] = {}
        self._kept: dict[str, float] = {}
        self._updates = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, record: Mapping[str, float], stage: str, iteration: int) -> None:
        """Show a finished iteration; its stage's metrics stay on the table until newer ones arrive."""
        self._updates += 1
        if stage != self._stage:
            self._stage, self._latest = stage, {}
        self._latest.update(record)
        heading = f"{self._title}  {stage} {iteration}  {self._updates}/{self._total}  {self._elapsed()}"
        if self._live:
            self._live.update(self._table(heading))
        else:
            self._print(_line(heading, record))

    def keep(self, record: Mapping[str, float]) -> None:
        """Show occasional metrics (evaluations): they stay on the table, in every stage, until the next ones."""
        self._kept.update(record)

    def message(self, text: str) -> None:
        """Print a permanent line above the live table."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._rich.print(Text(text), soft_wrap=True)
        self._rich.file.flush()

    def _table(self, heading: str) -> Group:
        """The newest value of every metric, one column per group; columns that do not fit go below."""
        groups: dict[str, list[tuple[str, float]]] = {}
        for name, value in (self._latest | self._kept).items():
            group, slash, short = name.partition("/")
            groups.setdefault(group if slash else "run", []).append((short if slash else name, value))
        columns = [_column(group, metrics) for group, metrics in groups.items()]
        return Group(Text(heading, style="bold"), Columns(columns, padding=(1, 2)))

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes}:{seconds:02d}"


def _column(group: str, metrics: list[tuple[str, float]]) -> Table:
    table = Table(title=Text(group), title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name, value in metrics:
        table.add_row(Text(name, style="dim"), Text(_number(value)))
    return table


def _line(heading: str, record: Mapping[str, float]) -> str:
    """A line of at most `LINE_CHARACTERS`: the metrics that matter most, as many as there is room for."""
    line = heading
    for prefix in FIRST:
        for name, value in record.items():
            part = f"  {name.removeprefix('loss/')} {_number(value)}"
            if name.startswith(prefix) and len(line) + len(part) <= LINE_CHARACTERS:
                line += part
    return line


def _number(value: float) -> str:
    return f"{value:.4g}"
