"""The learner of a run, which outlives its processes: when they are lost, they are started again and catch up.

    call ──► learner ──answer──► driver          every call that changes the learner goes into the journal
               └──snapshot──► object store ──► copy on the driver's machine: the journal before it is cleared
    lost ──► every rank ends ──► start ──► newest snapshot ──► the journal again ──► the lost call again

An update is a function of the learner's state, the iteration and the groups, which the object store still holds. So the
repeated ones give the same state to the bit, and the run records each of them once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from common.config.run import Config
from common.errors import LearnerError, ModelError
from common.group_ends import DueGroup, GroupFault
from common.learner_snapshot import LearnerSnapshot
from common.types import Guidance, Position, UpdateResult
from learner.driver.calls import answer, remote_reason
from learner.driver.rank_health import RankHealth
from learner.records.prometheus import RunMetrics

if TYPE_CHECKING:  # imports torch
    from common.sealed_group import SealedGroup
    from common.weights import Payload, PublishedWeights
    from learner.driver.learner_group import LearnerGroup

WINDOW_S = 600.0
CHECK_S = 0.25
"""While a call is due, the ranks' health is judged at this interval."""
SNAPSHOT_SHARE = 0.03
"""Snapshots take at most this part of the time of the calls that they spare from being repeated."""
MOST_REPEATED = 8
"""A snapshot is due after so many updates, whatever it takes: the journal keeps their groups in the object store."""

Watch = Callable[[], None]
"""Called at intervals while a call is due; it may raise what ends the run."""
Submit = Callable[[ActorHandle], list[ray.ObjectRef]]
"""Makes a call of the learner. The first reference is small and fetched when ready; the others are not fetched."""


class Answer(NamedTuple):
    """The answer to a call, and the references of all that it returned."""

    value: Any
    references: list[ray.ObjectRef]


def nothing() -> None:
    """There is nothing to watch."""


@dataclass(frozen=True)
class _Coming:
    """A snapshot that is on its way. `covers`: the number of entries of the journal that it makes superfluous."""

    snapshot: Future[LearnerSnapshot]
    covers: int


class DurableLearner:
    """Every call of a run's learner. A call returns when it is answered; lost processes cost time alone."""

    def __init__(
        self,
        group: LearnerGroup,
        health: RankHealth,
        say: Callable[[str], None],
        metrics: RunMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` tells of losses and returns."""
        self._group, self._health, self._say, self._metrics, self._clock = group, health, say, metrics, clock
        self._restarts = group.config.learner.restarts
        self._lost_at: deque[float] = deque()
        self._fingerprint = ""
        self._journal: list[Submit] = []
        self._snapshot: LearnerSnapshot | None = None
        self._coming: _Coming | None = None
        self._snapshot_s = 0.0
        self._updates, self._update_s = 0, 0.0

    def load(self) -> str:
        """Wait until every rank is loaded for the first time; return the fingerprint of the base.

        Raises:
            LearnerError, ConfigError, ModelError: see `LearnerGroup.wait_until_loaded`.
        """
        self._fingerprint = self._group.wait_until_loaded()
        self._health.follow(self._group.ranks, self._group.places)
        return self._fingerprint

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The backbone's schedule."""
        found: tuple[float, ...] = self._ask(lambda learner: [learner.sigmas.remote(num_steps)]).value
        return found

    def guidance(self) -> Guidance:
        """The backbone's kind of guidance."""
        found: Guidance = self._ask(lambda learner: [learner.guidance.remote()]).value
        return found

    def attest(self, group: ray.ObjectRef[SealedGroup], due: DueGroup, watch: Watch) -> GroupFault | None:
        """Have the learner fetch and check a group; None if it may be trained on."""
        fault: GroupFault | None = self._ask(lambda learner: [learner.attest.remote([group], due)], watch).value
        return fault

    def frozen_weights(self) -> ray.ObjectRef[Payload]:
        """The student's weights that do not change within a stage."""
        return self._ask(lambda learner: learner.frozen_weights.options(num_returns=2).remote()).references[1]

    def save(self, run_dir: Path, position: Position, settings: dict[str, Any]) -> Path:
        """Write a checkpoint."""
        folder: Path = self._ask(lambda learner: [learner.save.remote(run_dir, position, settings)]).value
        return folder

    def export(self, directory: Path) -> None:
        """Write the averaged student as a LoRA in diffusers' format."""
        self._ask(lambda learner: [learner.export.remote(directory)])

    def peak_gib(self) -> float:
        """Peak memory of rank 0 in GiB, since it was last started."""
        peak: float = self._ask(lambda learner: [learner.peak_gib.remote()]).value
        return peak

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def choose_threads(self) -> tuple[int, dict[int, float]]:
        """Use the fastest number of CPU threads on every rank; return it, and seconds of a pass by the number."""
        chosen: tuple[int, dict[int, float]] = self._ask(lambda learner: [learner.choose_threads.remote()]).value
        return chosen

    def configure(self, config: Config) -> None:
        """Start the learner with this configuration from now on. It must do what the present processes do."""
        self._group.config = config

    def restore(self, directory: Path, settings: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; the learner must still be in stage 1."""
        self._change(lambda learner: [learner.restore.remote(directory, settings)])
        self._take_snapshot()

    def begin_alignment(self) -> None:
        """Begin stage 2."""
        self._change(lambda learner: [learner.begin_alignment.remote()])

    def cold_start(self, iteration: int) -> UpdateResult:
        """Run one iteration of stage 1."""
        result: UpdateResult = self._update(lambda learner: [learner.cold_start.remote(iteration)])
        self._snapshot_if_due()
        return result

    def align(self, groups: Sequence[ray.ObjectRef[SealedGroup]], watch: Watch) -> UpdateResult:
        """Run one iteration of stage 2."""
        result: UpdateResult = self._update(lambda learner: [learner.align.remote(groups)], watch)
        return result

    def publish(self, number: int, *, averaged: bool) -> ray.ObjectRef[PublishedWeights]:
        """The student's weights as version `number`: the trained ones, or their moving average for evaluation.

        A snapshot that is due is taken after it, while the workers sample.
        """

        def submit(learner: ActorHandle) -> list[ray.ObjectRef]:
            references: list[ray.ObjectRef] = learner.publish.options(num_returns=2).remote(number, averaged=averaged)
            return references

        if averaged:
            return self._ask(submit).references[1]
        weights = self._change(submit).references[1]
        self._snapshot_if_due()
        return weights

    # ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, submit: Submit, watch: Watch = nothing) -> Answer:
        """The answer to a call, and its references. If the learner is lost meanwhile, start it again and repeat.

        Raises:
            LearnerError: it was lost more often than `learner.restarts` allows.
        """
        lost = ""
        while True:
            try:
                if lost:
                    self._start_again(lost, watch)
                return self._answered(submit, watch)
            except LearnerError as error:
                lost = self._count(error)

    def _answered(self, submit: Submit, watch: Watch) -> Answer:
        references = submit(self._group.leader)
        self._health.begin()
        while not ray.wait(references[:1], timeout=CHECK_S)[0]:
            fault = self._health.fault()
            if fault:
                raise LearnerError(f"the learner hangs: {fault}")
            watch()
        found = Answer(answer(references[0]), references)
        self._health.finished()
        return found

    def _change(self, submit: Submit, watch: Watch = nothing) -> Answer:
        """`_ask`, for a call that a learner which is started again must repeat."""
        found = self._ask(submit, watch)
        if self._restarts > 0:
            self._journal.append(submit)
        return found

    def _update(self, submit: Submit, watch: Watch = nothing) -> Any:
        """`_change`, for an iteration."""
        started = self._clock()
        found = self._change(submit, watch).value
        self._updates += 1
        self._update_s += self._clock() - started
        return found

    # ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _snapshot_if_due(self) -> None:
        self._adopt()
        spared = self._update_s * SNAPSHOT_SHARE >= self._snapshot_s or self._updates >= MOST_REPEATED
        if self._updates > 0 and spared and self._coming is None:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        """Ask for a snapshot. Its future fetches a copy to this machine, while the run goes on."""
        if self._restarts == 0:
            return
        self._updates, self._update_s = 0, 0.0
        asked_at = self._clock()
        snapshot: Future[LearnerSnapshot] = self._group.leader.snapshot.remote().future()
        self._coming = _Coming(snapshot, len(self._journal))
        snapshot.add_done_callback(lambda _: self._arrived(self._clock() - asked_at))

    def _arrived(self, seconds: float) -> None:
        self._snapshot_s = seconds
        self._metrics.learner_snapshot(seconds)

    def _adopt(self) -> None:
        """If a snapshot has arrived, it replaces the one before, and what the journal has from before it."""
        coming = self._coming
        if coming is None or not coming.snapshot.done():
            return
        self._coming = None
        error = coming.snapshot.exception()
        if error is None:
            self._snapshot = coming.snapshot.result()
            del self._journal[: coming.covers]
        elif not isinstance(error, RayActorError):  # the next call notices a learner that is lost
            self._say(f"there is no newer snapshot of the learner: {remote_reason(error)}; the run goes on")

    # ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self, error: LearnerError) -> str:
        """Count a loss; return its reason. LearnerError if it is one too many."""
        reason = remote_reason(error) if isinstance(error, RayError) else str(error)
        now = self._clock()
        while self._lost_at and now - self._lost_at[0] >= WINDOW_S:
            self._lost_at.popleft()
        self._lost_at.append(now)
        if len(self._lost_at) <= self._restarts:
            return reason
        self._group.stop()
        times = "once" if len(self._lost_at) == 1 else f"{len(self._lost_at)} times within {WINDOW_S / 60:.0f} minutes"
        raise LearnerError(
            f"{reason}; it was lost {times} (learner.restarts = {self._restarts}): look for the reason in logs/, and "
            "continue with --resume"
        ) from error

    def _start_again(self, reason: str, watch: Watch) -> None:
        """Start every rank, and give them the state of those that are lost."""
        started = self._clock()
        count = f"{len(self._lost_at)} of at most {self._restarts} times within {WINDOW_S / 60:.0f} minutes"
        self._say(f"the learner is gone: {reason}; it is started again ({count})")
        self._metrics.learner_restarted()
        self._adopt()
        self._coming = None
        self._group.stop()
        self._group.start()
        if self._group.wait_until_loaded(watch) != self._fingerprint:
            raise ModelError(
                "the learner that was started again found another model at backbone.path than before: restore its "
                "files, and continue with --resume"
            )
        self._health.follow(self._group.ranks, self._group.places)
        if self._snapshot is not None:
            kept = ray.put(self._snapshot)
            self._answered(lambda learner: [learner.load_snapshot.remote([kept])], watch)
        for submit in self._journal:
            self._answered(submit, watch)
        self._say(
            f"the learner is back after {self._clock() - started:.0f} s; calls repeated since its newest snapshot: "
            f"{len(self._journal)}"
        )
