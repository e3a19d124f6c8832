"""Periodic work between iterations: evaluate the averaged student, save a grid of samples, write a checkpoint.

Also obeys requests through Redis: pause, stop, or use another number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.command import system_error
from common.config.run import Config
from common.console_stream import LOG
from common.errors import RunStopped, StoreError
from common.policies import SamplingSpec
from common.run_control import RunControl, RunRequest
from common.types import AlarmAction, Position, Prompt, Stage
from learner.driver.checkpoint_writer import CheckpointWriter
from learner.driver.evaluation import Evaluation, evaluate, save_grid
from learner.driver.publisher import Publisher
from learner.driver.watchdog import Alarm, Watchdog
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
        publisher: Publisher,
        pool: WorkerPool,
        tracker: Tracker,
        checkpoints: CheckpointWriter,
        watchdog: Watchdog,
        prompts: Sequence[Prompt],
        spec: SamplingSpec,
        control: RunControl | None,
    ) -> None:
        """`spec` is the student's sampling."""
        self._control = control
        self._config = config
        self._run_dir = run_dir
        self._publisher = publisher
        self._pool = pool
        self._tracker = tracker
        self._prompts = prompts[: config.evaluation.prompts]
        self._spec = spec
        self._checkpoints = checkpoints
        self._watchdog = watchdog
        self._workers: int | None = None

    def begin_alignment(self) -> None:
        """Evaluate the student that stage 2 starts from: the watchdog compares every later one with it."""
        if self._config.alignment.iterations == 0:
            return
        start = Position(Stage.ALIGNMENT, 0)
        self._evaluate(start)
        if self._config.watchdog.on_alarm is AlarmAction.ROLL_BACK:
            self.checkpoint(start)

    def after(self, position: Position) -> None:
        settings = self._config.evaluation
        every = settings.every if position.stage is Stage.ALIGNMENT else settings.cold_start_every
        if position.iteration % every == 0:
            self._evaluate(position)
        alarms = self._watchdog.look(position)
        self._checkpoints.periodic(position, self._needed())
        if alarms:
            self._act_on(alarms, position)
        self._obey(position)

    def checkpoint(self, position: Position) -> None:
        """Write a checkpoint, unless there is one; errors as in `CheckpointWriter.write`."""
        self._checkpoints.write(position, self._needed())

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
        self._tracker.evaluation(position, "student", evaluation.metrics, time.perf_counter() - started)
        try:
            save_grid(evaluation, grid, self._config.evaluation.grid_prompts)
            self._tracker.message(f"its pictures: {grid}")
        except OSError as error:
            LOG.warning(f"the pictures are not kept: {system_error(error, grid)}; the run goes on")
        self._watchdog.add(position, evaluation.prompts)

    def _act_on(self, alarms: Sequence[Alarm], position: Position) -> None:
        """Count the alarms, and do what `watchdog.on_alarm` says.

        Raises:
            RunStopped: the run was rolled back, or it cannot pause without Redis.
        """
        action = self._config.watchdog.on_alarm
        for alarm in alarms:
            self._tracker.alarm(alarm.detector)
            if action is not AlarmAction.MARK:
                self._tracker.message(f"watchdog, after {alarm.iteration} iterations: {alarm.message}")
        if action is AlarmAction.PAUSE:
            self.checkpoint(position)
            self._ask_to_pause()
        if action is AlarmAction.ROLL_BACK:
            self._roll_back()

    def _ask_to_pause(self) -> None:
        """Make the request that `_obey` finds; RunStopped without a Redis to make it in."""
        try:
            if self._control is not None:
                self._control.ask("pause")
                return
        except StoreError:
            pass
        raise RunStopped("stopped by the watchdog, because there is no Redis to pause in")

    def _roll_back(self) -> None:
        """Set aside the checkpoints after the best one, and stop."""
        store = self._checkpoints.store
        best = self._watchdog.best(store.iterations(Stage.ALIGNMENT))
        if best is None:
            raise RunStopped("stopped by the watchdog, without a roll-back: no checkpoint of this stage was evaluated")
        iteration, gold = best
        kept = Position(Stage.ALIGNMENT, iteration)
        later = store.set_aside_after(kept, "rolled_back")
        raise RunStopped(
            f"rolled back by the watchdog to {kept.directory}, the best checkpoint by held-out reward ({gold:.3f}); "
            f"{later} later ones are kept as *.rolled_back; rtdmd export and --resume use {kept.directory}"
        )

    def _needed(self) -> list[Position]:
        """The checkpoint that a roll-back needs."""
        if self._config.watchdog.on_alarm is not AlarmAction.ROLL_BACK:
            return []
        best = self._watchdog.best(self._checkpoints.store.iterations(Stage.ALIGNMENT))
        return [] if best is None else [Position(Stage.ALIGNMENT, best[0])]

    def _obey(self, position: Position) -> None:
        """Pause while Redis holds a pause request; on a stop request, write a checkpoint. Without Redis do neither.

        Raises:
            RunStopped: a stop was requested; the request is removed.
        """
        self._scale()
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

    def _scale(self) -> None:
        """Use the number of workers that is requested, if it is another one than before."""
        try:
            count = None if self._control is None else self._control.workers_asked()
        except StoreError:
            return
        if count is not None and count != self._workers:
            self._pool.resize(count)
            self._tracker.message(f"uses {count} rollout workers on request, or as many as can be placed")
            self._workers = count

    def _asked(self) -> RunRequest | None:
        try:
            return None if self._control is None else self._control.asked()
        except StoreError:
            return None
