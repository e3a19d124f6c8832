"""Weights & Biases. Its own variables apply: WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY, WANDB_MODE=offline.

Online, its process sends the figures, and repeats that until they arrive. Its copy is in the run's folder `wandb`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb

from learner.records.trackers.protocol import Cell, TrackedRun, TrackerError

REACHED_S = 30.0
"""Seconds in which the server must answer when a run is opened."""
FINISHED_S = 30.0
"""Seconds in which the last figures must arrive when it is closed."""


class WeightsAndBiases:
    """A run of Weights & Biases."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # else it writes over the console's table, and asks for a key
        settings = wandb.Settings(
            console="off",  # standard output and error belong to the run's own console and log
            disable_code=True,
            disable_git=True,
            finish_timeout=FINISHED_S,
            finish_timeout_raises=True,
            init_timeout=REACHED_S,
            x_disable_meta=True,  # the command line and the machine are not sent
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=run.project, name=run.name, id=run.id, resume="allow", dir=str(run.directory), settings=settings
        )
        self._folder = Path(self._run.dir).parent

    def configuration(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, png: Path) -> None:
        self._run.log({name: wandb.Image(str(png))}, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def flush(self) -> None:
        """Nothing to do: its process writes every figure into a file at once."""

    def close(self) -> None:
        try:
            self._run.finish()
        except TimeoutError as error:
            raise TrackerError(f"not all figures arrived: `wandb sync {self._folder}` sends them") from error
