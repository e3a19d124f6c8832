"""Writes the checkpoints of a run, and outlasts a disk that is full for a while.

A periodic checkpoint that cannot be written is a warning: training goes on, and another one is tried after every
iteration. The run waits for the disk where it cannot go on without a checkpoint: at the end of a stage, on a request to
stop, and when the next periodic one is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from common.command import system_error
from common.config.run import CheckpointConfig
from common.console_stream import LOG
from common.errors import CheckpointError
from common.types import Position
from learner.checkpoint import CheckpointStore
from learner.driver.durable_learner import DurableLearner
from learner.records.line_file import LineFile
from learner.records.metrics_log import Tracker, best_evaluation

PATIENCE_S, RETRY_S = 600.0, 5.0
"""Seconds that a run waits for the disk at most, and between two attempts."""


class CheckpointWriter:
    """Writes checkpoints, and removes old ones.

    Args:
        settings: stored in every checkpoint, see `learner.driver.run_directory.continuity`.
        lines: files whose lines a checkpoint must not be ahead of: a resumed run does not write them again.
        written: called after a checkpoint was written and old ones were removed.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: Path,
        learner: DurableLearner,
        tracker: Tracker,
        settings: dict[str, Any],
        lines: Sequence[LineFile],
        written: Callable[[], None],
    ) -> None:
        self.store = CheckpointStore.of_run(run_dir)
        self._config = config
        self._run_dir = run_dir
        self._learner = learner
        self._tracker = tracker
        self._settings = settings
        self._lines = lines
        self._written = written
        self._best: Position | None = None
        self._owed = False

    def periodic(self, position: Position, spared: Collection[Position]) -> None:
        """After an iteration: write a checkpoint if one is due, or if the one before could not be written.

        Args:
            spared: checkpoints that must not be removed.

        Raises:
            CheckpointError: as `write`, if the one before could not be written either.
        """
        due = position.iteration % self._config.every == 0
        if due and self._owed:
            self.write(position, spared)
        elif due or self._owed:
            try:
                self._write(position, spared)
            except CheckpointError as error:
                if not self._owed:
                    LOG.warning(f"{error}; training goes on, and it is tried again after every iteration")
                self._owed = True

    def write(self, position: Position, spared: Collection[Position] = ()) -> None:
        """Write a checkpoint that the run cannot go on without.

        Raises:
            CheckpointError: the disk has refused it for `PATIENCE_S`.
        """
        until, warned = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                self._write(position, spared)
                return
            except CheckpointError as error:
                if time.monotonic() >= until:
                    raise CheckpointError(f"{error}; continue with --resume") from error
                if not warned:
                    LOG.warning(f"{error}; the run waits for it, at most {PATIENCE_S:g} s")
                warned = True
            time.sleep(RETRY_S)

    def _write(self, position: Position, spared: Collection[Position]) -> None:
        if self.store.exists(position):
            # Already saved: a stage ended on a periodic checkpoint, or a resumed run is at its start.
            return
        try:
            for file in self._lines:
                file.settle()
        except OSError as error:
            raise CheckpointError(f"cannot write a checkpoint: {system_error(error)}") from error
        self._tracker.checkpoint(self._learner.save(self._run_dir, position, self._settings))
        if self._owed:
            self._tracker.message(f"the checkpoint {position.directory} could be written")
        self._owed = False
        best = self._best_of(position)
        self.store.prune(position.stage, self._config.keep, {*spared, *best})
        self._written()

    def _best_of(self, position: Position) -> set[Position]:
        """The best checkpoint of a stage by the metric that the run file names, if it names one."""
        if self._config.best is None:
            return set()
        iterations = self.store.iterations(position.stage)
        found = best_evaluation(self._tracker.lines.path, position.stage, self._config.best, iterations)
        if found is None:
            return set()
        best = Position(position.stage, found[0])
        if best != self._best:
            self._best = best
            self._tracker.message(f"best checkpoint by {self._config.best} so far: {best.directory} ({found[1]:.3f})")
        return {best}
