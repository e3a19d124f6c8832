"""Periodic work between iterations: evaluate the averaged student, save a grid of samples, write a checkpoint.

Also obeys requests through Redis: pause or stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from common.config.run import Config
from common.errors import RunStopped, StoreError
from common.policies import SamplingSpec
from common.run_control import RunControl, RunRequest
from common.types import Position, Prompt, Stage
from learner.checkpoint import CheckpointStore
from learner.driver.calls import answer
from learner.driver.evaluation import Evaluation, evaluate, save_grid
from learner.driver.publisher import Publisher
from learner.driver.worker_pool import WorkerPool
from learner.records.metrics_log import Tracker

EVALUATION_VERSION = -1
"""Averaged weights have this version number: no training iteration samples with them."""

PAUSE_POLL_S = 1.0


class RunMilestones:
    """Periodic work of a run; the loops call it after every iteration."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        learner: ActorHandle,
        publisher: Publisher,
        pool: WorkerPool,
        tracker: Tracker,
        prompts: Sequence[Prompt],
        spec: SamplingSpec,
        settings: dict[str, Any],
        control: RunControl | None,
    ) -> None:
        """`spec` is the student's sampling; `settings` are stored in every checkpoint and must be equal on resume."""
        self._control = control
        self._config = config
        self._run_dir = run_dir
        self._learner = learner
        self._publisher = publisher
        self._pool = pool
        self._tracker = tracker
        self._prompts = prompts[: config.evaluation.prompts]
        self._spec = spec
        self._settings = settings

    def after(self, position: Position) -> None:
        settings = self._config.evaluation
        every = settings.every if position.stage is Stage.ALIGNMENT else settings.cold_start_every
        if position.iteration % every == 0:
            self._evaluate(position)
        if position.iteration % self._config.checkpoint.every == 0:
            self.checkpoint(position)
        self._obey(position)

    def checkpoint(self, position: Position) -> None:
        store = CheckpointStore.of_run(self._run_dir)
        if store.exists(position):
            # Already saved: a stage ended on a periodic checkpoint, or a resumed run is at its start.
            return
        folder: Path = answer(self._learner.save.remote(self._run_dir, position, self._settings))
        self._tracker.checkpoint(folder)
        store.prune(position.stage, self._config.checkpoint.keep)

    def _evaluate(self, position: Position) -> None:
        started = time.perf_counter()
        weights = self._publisher.publish(EVALUATION_VERSION, averaged=True)
        evaluation: Evaluation = evaluate(
            self._pool,
            self._prompts,
            self._spec,
            self._config.evaluation.images_per_prompt,
            weights,
            group_size=self._config.alignment.group_size,
        )
        name = f"{position.stage}-{position.iteration:06d}.png"
        grid = self._run_dir / "samples" / name
        save_grid(evaluation, grid, self._config.evaluation.grid_prompts)
        self._tracker.evaluation(position, "student", evaluation.metrics, time.perf_counter() - started)
        self._tracker.message(f"its pictures: {grid}")

    def _obey(self, position: Position) -> None:
        """Pause while Redis holds a pause request; on a stop request, write a checkpoint. Without Redis do neither.

        Raises:
            RunStopped: a stop was requested; the request is removed.
        """
        request = self._asked()
        if request == "pause":
            self._tracker.message(f"paused on request; delete rtdmd:run:{self._config.run.name} in Redis to continue")
            self._tracker.paused(True)
            while request == "pause":
                time.sleep(PAUSE_POLL_S)
                request = self._asked()
            self._tracker.paused(False)
            self._tracker.message("continuing")
        if request == "stop" and self._control is not None:
            self.checkpoint(position)
            # Otherwise the resumed run would stop at once.
            with suppress(StoreError):
                self._control.ask(None)
            raise RunStopped(f"stopped on request after {position.iteration} iterations of {position.stage}")

    def _asked(self) -> RunRequest | None:
        try:
            return None if self._control is None else self._control.asked()
        except StoreError:
            return None
