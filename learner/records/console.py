"""Console output of a run: a live table on a terminal, else one plain line per iteration.

    with Console({"cold_start": 1000, "alignment": 400}, title="shapes") as console:
        console.update({"reward/hps": 0.27, "seconds/step": 1.3}, stage="alignment", iteration=7)
        console.keep({"evaluation/gold": 0.62})
        console.message("checkpoint written")

Both show the numbers that matter; `metrics.jsonl` has all of them. The part of a metric's name before the first slash
is its group ("reward", "loss", "seconds", "speed", "evaluation").
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from learner.metric_names import DROPPED_GROUPS
from learner.records.iterations import Iterations, Trend

LINE_CHARACTERS = 160
"""Longest line of an iteration where there is no terminal."""
TITLE_CHARACTERS = 40
UNKNOWN_WIDTH = 80
STEP, ROLLOUTS, UPDATE = "seconds/step", "seconds/wait_rollouts", "seconds/wait_update"
SPEED = "speed/images per second"
REWARD, EVALUATION = "reward/", "evaluation/"
REWARD_DIGITS = 4
DROPPED = f"loss/{DROPPED_GROUPS}"
NOTABLE = ("loss/teacher_distance", "loss/fake_score_loss", "loss/student_gradient_norm")
"""Other metrics that are shown, the most important first."""
ARROWS = {Trend.UP: "↑", Trend.DOWN: "↓", Trend.FLAT: "→", Trend.UNKNOWN: ""}
WORDS = {Trend.UP: " up", Trend.DOWN: " down", Trend.FLAT: "", Trend.UNKNOWN: ""}


class Console:
    """Progress of one stage after another.

    Args:
        iterations: stage -> its number of iterations.
        title: usually the run's name.
        stream: where to write; a terminal gets the live table.
        quiet: show nothing; warnings and errors take another way (`learner/records/run_log.py`).
    """

    def __init__(
        self, iterations: Mapping[str, int], title: str, stream: TextIO | None = None, *, quiet: bool = False
    ) -> None:
        self._title = title if len(title) <= TITLE_CHARACTERS else f"{title[: TITLE_CHARACTERS - 2]}.."
        self._quiet = quiet
        self._rich = RichConsole(file=stream or sys.stdout)
        if self._rich.width < 1:  # COLUMNS=0, as a serial console gives it: nothing would be shown
            self._rich.width = UNKNOWN_WIDTH
        live = self._rich.is_terminal and not quiet
        self._live = Live(console=self._rich, refresh_per_second=4, transient=False) if live else None
        self._progress = Iterations(iterations)
        self._evaluation: dict[str, float] = {}
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
        """Show a finished iteration, counted from 0."""
        self._progress.finished(record, stage, iteration, time.monotonic())
        if self._live:
            self._live.update(self._table(record))
        elif not self._quiet:
            self._print(self._line(record))

    def keep(self, record: Mapping[str, float]) -> None:
        """Show the metrics of an evaluation, in every stage, until the next one."""
        for name, value in record.items():
            self._progress.seen(name, value)
        self._evaluation.update(record)

    def message(self, text: str) -> None:
        """Print a permanent line, above the live table."""
        if not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        self._rich.print(Text(text), soft_wrap=True)
        self._rich.file.flush()

    # ── one line ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _line(self, record: Mapping[str, float]) -> str:
        """At most `LINE_CHARACTERS`: parts that do not fit are left out, the least important first."""
        left = self._progress.left_s()
        line = f"{self._title}  {self._progress}{'' if left is None else f'  ETA {_clock(left)}'}"
        for part in self._parts(record):
            if len(line) + len(part) + 2 <= LINE_CHARACTERS:
                line += f"  {part}"
        return line

    def _parts(self, record: Mapping[str, float]) -> Iterator[str]:
        """The most important first."""
        if STEP in record:
            yield f"{_number(record[STEP])} s{self._split(record)}"
        if record.get(DROPPED, 0) > 0:
            yield f"dropped {record[DROPPED]:g}"
        trained = self._of_group(record, REWARD)
        evaluated = self._of_group(self._evaluation, EVALUATION)
        for group, values in ((REWARD, trained), (EVALUATION, _without(evaluated, trained))):
            for name, value in values.items():
                yield f"{name} {_number(value, REWARD_DIGITS)}{WORDS[self._progress.trend(group + name)]}"
        if SPEED in record:
            yield f"{_number(record[SPEED])} img/s"
        yield from (f"{label} {value}" for label, value in self._notable(record))

    @staticmethod
    def _split(record: Mapping[str, float]) -> str:
        """The iteration's seconds by part, if it had rollouts."""
        if ROLLOUTS not in record or UPDATE not in record:
            return ""
        return f" ({_number(record[ROLLOUTS])} rollout, {_number(record[UPDATE])} update)"

    # ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _table(self, record: Mapping[str, float]) -> Group:
        left = self._progress.left_s()
        heading = f"{self._title}  {self._progress}  {_clock(time.monotonic() - self._started)} so far"
        heading += "" if left is None else f", ETA {_clock(left)}"
        return Group(Text(heading, style="bold"), self._rewards(record), self._speed(record))

    def _rewards(self, record: Mapping[str, float]) -> Table:
        """One row per reward: in training, and in the newest evaluation."""
        table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
        table.add_column("reward", overflow="fold")
        table.add_column("training", justify="right", overflow="fold")
        table.add_column("evaluation", justify="right", overflow="fold")
        trained, evaluated = self._of_group(record, REWARD), self._of_group(self._evaluation, EVALUATION)
        for name in dict.fromkeys([*trained, *evaluated]):
            cells = (self._cell(REWARD, trained, name), self._cell(EVALUATION, evaluated, name))
            table.add_row(Text(name), *map(Text, cells))
        return table

    def _cell(self, group: str, values: Mapping[str, float], name: str) -> str:
        if name not in values:
            return ""
        return f"{_number(values[name], REWARD_DIGITS)} {ARROWS[self._progress.trend(group + name)]:1}"

    def _speed(self, record: Mapping[str, float]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right", overflow="fold")
        rows = [("s/iteration", STEP), ("  rollouts", ROLLOUTS), ("  update", UPDATE), ("img/s", SPEED)]
        for label, key in rows:
            if key in record:
                table.add_row(Text(label), Text(_number(record[key])))
        for label, value in self._notable(record):
            table.add_row(Text(label), Text(value))
        if record.get(DROPPED, 0) > 0:
            table.add_row(Text("dropped groups"), Text(f"{record[DROPPED]:g}"))
        return table

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _of_group(record: Mapping[str, float], group: str) -> dict[str, float]:
        return {name.removeprefix(group): value for name, value in record.items() if name.startswith(group)}

    @staticmethod
    def _notable(record: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        for key in NOTABLE:
            if key in record:
                yield key.partition("/")[2].replace("_", " "), _number(record[key])


def _without(values: Mapping[str, float], names: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in names}


def _number(value: float, digits: int = 3) -> str:
    """The zeros at the end stay, so that a column does not jump."""
    return f"{value:#.{digits}g}".rstrip(".") if 1e-4 <= abs(value) < 1e4 else f"{value:.{digits}g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
