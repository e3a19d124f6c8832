"""trackio: a database on this machine (TRACKIO_DIR), or a Space of Hugging Face (TRACKIO_SPACE_ID)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import trackio

from learner.records.trackers.protocol import Cell, TrackedRun


class TrackioProject:
    """A run of trackio. It goes on under its name and the end of its id: trackio resumes runs by their names."""

    def __init__(self, run: TrackedRun) -> None:
        name = f"{run.name}-{run.id[:4]}"
        with redirect_stdout(io.StringIO()):  # it would write over the console's table
            self._run = trackio.init(
                project=run.project, name=name, resume="allow", embed=False, auto_log_cpu=False, auto_log_gpu=False
            )

    def configuration(self, values: Mapping[str, str]) -> None:
        self._run.config.update(values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, png: Path) -> None:
        self._run.log({name: trackio.Image(png)}, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self._run.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def flush(self) -> None:
        """Nothing to do: a thread of trackio writes, and `close` waits for it."""

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()
