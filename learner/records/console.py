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

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text


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
        heading = f"{self._title} · {stage} {iteration} · {self._updates}/{self._total} · {self._elapsed()}"
        if self._live:
            self._live.update(self._table(heading))
        else:
            values = "  ".join(f"{name}={_number(value)}" for name, value in record.items())
            self._print(f"{heading}  {values}")

    def keep(self, record: Mapping[str, float]) -> None:
        """Show occasional metrics (evaluations): they stay on the table, in every stage, until the next ones."""
        self._kept.update(record)

    def message(self, text: str) -> None:
        """Print a permanent line above the live table."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._rich.print(Text(text), soft_wrap=True)
        self._rich.file.flush()

    def _table(self, heading: str) -> Table:
        """The newest value of every metric, one column per group."""
        groups: dict[str, list[tuple[str, float]]] = {}
        for name, value in (self._latest | self._kept).items():
            group, slash, short = name.partition("/")
            groups.setdefault(group if slash else "", []).append((short if slash else name, value))
        table = Table(title=Text(heading), title_justify="left", expand=False)
        for group in groups:
            table.add_column(Text(group or "run"), overflow="fold")
        table.add_row(*(_cell(metrics) for metrics in groups.values()))
        return table

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes}:{seconds:02d}"


def _cell(metrics: list[tuple[str, float]]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(justify="right")
    for name, value in metrics:
        grid.add_row(Text(name, style="dim"), Text(_number(value)))
    return grid


def _number(value: float) -> str:
    return f"{value:.4g}"
