"""What a run does now and then: evaluate the averaged student, save a grid of samples, write a checkpoint.

And what it is asked to do meanwhile, through Redis: pause, or stop.
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
from common.redis_link import RunControl, RunRequest
from common.types import Position, Prompt, Stage
from learner.checkpoint import CheckpointStore
from learner.driver.calls import answer
from learner.driver.evaluation import Evaluation, evaluate, save_grid
from learner.driver.worker_pool import WorkerPool
from learner.records.metrics_log import Tracker

EVALUATION_VERSION = -1
"""Version number of averaged weights: no training iteration samples with them."""

PAUSE_POLL_S = 1.0


class RunMilestones:
    """Called by the loops after every iteration."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        learner: ActorHandle,
        pool: WorkerPool,
        tracker: Tracker,
        prompts: Sequence[Prompt],
        spec: SamplingSpec,
        settings: dict[str, Any],
        control: RunControl | None,
    ) -> None:
        """`spec` says how the student samples; `settings` go into every checkpoint and must be equal on resume."""
        self._control = control
        self._config = config
        self._run_dir = run_dir
        self._learner = learner
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
            # The end of a stage that fell on a periodic checkpoint, or a resumed run at its start: the same state.
            return
        answer(self._learner.save.remote(self._run_dir, position, self._settings))
        store.prune(position.stage, self._config.checkpoint.keep)

    def _evaluate(self, position: Position) -> None:
        started = time.perf_counter()
        weights = self._learner.publish.remote(EVALUATION_VERSION, averaged=True)
        evaluation: Evaluation = evaluate(
            self._pool, self._prompts, self._spec, self._config.evaluation.images_per_prompt, weights
        )
        name = f"{position.stage}-{position.iteration:06d}.png"
        save_grid(evaluation, self._run_dir / "samples" / name, self._config.evaluation.grid_prompts)
        self._tracker.evaluation(position, "student", evaluation.metrics, time.perf_counter() - started)

    def _obey(self, position: Position) -> None:
        """Pause as long as somebody asks for it; stop with a checkpoint. While Redis is away nobody asks for anything.

        Raises:
            RunStopped: somebody asked the run to stop; the request is taken back.
        """
        request = self._asked()
        if request == "pause":
            self._tracker.message(f"paused on request; delete rtdmd:run:{self._config.run.name} in Redis to go on")
            while request == "pause":
                time.sleep(PAUSE_POLL_S)
                request = self._asked()
            self._tracker.message("going on")
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
