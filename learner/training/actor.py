"""The learner: leads its ranks through every operation.

    driver ──► Learner: rank 0 in this process ─┐
                  └──► LearnerRank actors 1 .. ─┴─► all do their share at once, and their sums are equal

Plain Python; `learner/driver/learner_group.py` makes Ray actors of `Learner` and `LearnerRank`. The driver only calls
`Learner`. Scored groups arrive as object references: they go from the workers to the ranks without passing the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from common.config.run import Config
from common.errors import AttestationError, RankError, one_line
from common.group_ends import DueGroup, GroupFault
from common.heartbeat import Heartbeat
from common.learner_snapshot import LearnerSnapshot
from common.rewards.access import RewardAccess
from common.sealed_group import SealedGroup
from common.types import Guidance, PolicyVersion, Position, ProcessPlace, Prompt, UpdateResult
from common.weights import Payload, PublishedWeights
from learner.training.batch_metrics import Totals
from learner.training.group_provenance import PublishedPolicies
from learner.training.learner_rank import LearnerRank
from learner.training.ranks import Meeting
from learner.training.thread_probe import best_number

Result = TypeVar("Result")


class Learner:
    """Rank 0 and the handles of the other ranks."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        rewards: RewardAccess,
        device: str,
        meeting: Meeting | None = None,
        others: Sequence[ActorHandle] = (),
    ) -> None:
        """`others` are actors of `LearnerRank` that wait at the same meeting point.

        Raises:
            ModelError: see `LearnerRank`.
        """
        self._shard_base = config.learner.shard_base
        self._releases_memory = config.phases_share_gpus
        self._others = others
        self._published = PublishedPolicies(config.alignment.max_staleness)
        self._publish_seconds = 0.0
        self._own = LearnerRank(config, prompts, rewards, device, meeting)

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The backbone's schedule; it returns once the backbone is loaded."""
        return self._own.sigmas(num_steps)

    def guidance(self) -> Guidance:
        """The backbone's kind of guidance."""
        return self._own.guidance()

    def ready(self) -> tuple[str, ProcessPlace]:
        """Return the fingerprint of the base once rank 0 is loaded, and where it runs."""
        return self._own.ready()

    def heartbeat(self) -> Heartbeat:
        """The step that rank 0 is in. A thread of its own answers."""
        return self._own.heartbeat()

    def choose_threads(self) -> tuple[int, dict[int, float]]:
        """Use the fastest number of CPU threads on every rank; return it, and seconds of a pass by the number."""
        pending = [other.time_threads.remote() for other in self._others]
        seconds = _all_ranks(self._own.time_threads, pending)[0]
        number = best_number(seconds)
        self.use_threads(number)
        return number, seconds

    def use_threads(self, number: int) -> None:
        """Use this number of CPU threads on every rank."""
        pending = [other.use_threads.remote(number) for other in self._others]
        _all_ranks(lambda: self._own.use_threads(number), pending)

    def cold_start(self, iteration: int) -> UpdateResult:
        """Run one iteration of stage 1."""
        pending = [other.cold_start.remote(iteration) for other in self._others]
        totals = _all_ranks(lambda: self._own.cold_start(iteration), pending)
        return UpdateResult(Totals.merged(totals).values(), {}, peak_bytes=self._own.peak_bytes())

    def begin_alignment(self) -> None:
        """Freeze stage 1's averaged student and fake score, and add a fresh adapter to each."""
        pending = [other.begin_alignment.remote() for other in self._others]
        _all_ranks(self._own.begin_alignment, pending)

    def attest(self, group: Sequence[ray.ObjectRef[SealedGroup]], due: DueGroup) -> GroupFault | None:
        """Have every rank fetch a group (a list of one reference) and check it; None if it may be trained on.

        The driver calls it for each group when it is scored, so that the next update finds all of them here.

        Raises:
            RankError: another rank is gone.
        """
        pending = [other.fetch_whole.remote(group) for other in self._others]
        try:
            faults = _all_ranks(lambda: self._own.fetch_whole(group), pending)
        except RayActorError as error:
            raise RankError(f"a rank of the learner is gone ({one_line(error)}) while groups arrived") from error
        if any(faults):
            return next(filter(None, faults))
        return self._published.fault(ray.get(group[0]), due)

    def align(self, groups: Sequence[ray.ObjectRef[SealedGroup]]) -> UpdateResult:
        """Run one iteration of stage 2.

        Raises:
            AttestationError: the groups are damaged, were not sampled with the right plan and weights, or surrogate_gap
                is beyond its limit; the student has not changed then.
            RewardError, TrainingError, RankError: see `AlignmentTrainer.update`.
        """
        self._published.attest([sealed.group for sealed in ray.get(list(groups))])
        pending = [other.align.remote(groups) for other in self._others]
        updates = _all_ranks(lambda: self._own.align(groups), pending)
        metrics = Totals.merged([update.totals for update in updates]).values()
        first = updates[0]
        seconds = {**first.seconds, "publish": self._publish_seconds}
        return UpdateResult(metrics, seconds, first.trained, self._own.peak_bytes())

    def publish(self, number: int, *, averaged: bool) -> tuple[PolicyVersion, PublishedWeights]:
        """The student's weights as version `number`: the trained ones, or their moving average for evaluation.

        The version stands first and alone, so that the driver can wait for it and leave the weights where they are.
        """
        started = time.perf_counter()
        pending = [other.attestation_pass.remote(averaged=averaged) for other in self._others if self._shard_base]
        published = _all_ranks(lambda: self._own.publish(number, averaged=averaged), pending)[0]
        if not averaged:
            self._published.remember(published.manifest.version)
        if self._releases_memory:  # sampling is next
            pending = [other.release_memory.remote() for other in self._others]
            _all_ranks(self._own.release_memory, pending)
        self._publish_seconds = time.perf_counter() - started
        return published.manifest.version, published

    def frozen_weights(self) -> tuple[None, Payload]:
        """The student's weights that `publish` leaves out: they do not change within a stage. None: see `publish`."""
        return None, self._own.frozen_weights()

    def snapshot(self) -> LearnerSnapshot:
        """Everything that training has changed, from which another learner continues."""
        return self._own.snapshot(self._published.fingerprints)

    def load_snapshot(self, snapshot: Sequence[ray.ObjectRef[LearnerSnapshot]]) -> None:
        """Continue from a snapshot (a list of one reference); the learner must still be in stage 1.

        Raises:
            AttestationError: see `LearnerRank.load_snapshot`.
        """
        pending = [other.load_snapshot.remote(snapshot) for other in self._others]
        _all_ranks(lambda: self._own.load_snapshot(snapshot), pending)
        self._published.restore(ray.get(snapshot[0]).policies)

    def save(self, run_dir: Path, position: Position, settings: dict[str, Any]) -> Path:
        """Write a checkpoint.

        Raises:
            AttestationError: another rank has different weights or moments; nothing is written then.
        """
        if self._others:
            self._require_equal_ranks(position)
        return self._own.save(run_dir, position, settings)

    def _require_equal_ranks(self, position: Position) -> None:
        pending = [other.state_fingerprint.remote() for other in self._others]
        ours, *others = _all_ranks(self._own.state_fingerprint, pending)
        for index, theirs in enumerate(others, 1):
            if theirs != ours:
                raise AttestationError(
                    f"rank {index} of the learner has drifted from rank 0 before {position.directory}: continue from "
                    "the checkpoint before it with --resume"
                )

    def restore(self, directory: Path, settings: dict[str, Any] | None) -> Position:
        """Continue from a checkpoint; the learner must still be in stage 1.

        Raises:
            CheckpointError: see `Checkpoint`.
        """
        pending = [other.restore.remote(directory, settings) for other in self._others]
        return _all_ranks(lambda: self._own.restore(directory, settings), pending)[0]

    def peak_gib(self) -> float:
        """Peak memory of rank 0 in GiB, see `LearnerRank.peak_bytes`."""
        return self._own.peak_bytes() / 2**30

    def export(self, directory: Path) -> None:
        """Write the averaged student as a LoRA in diffusers' format, see `learner.training.lora_file.write_lora`."""
        self._own.export(directory)


def _all_ranks(own: Callable[[], Result], pending: Sequence[ray.ObjectRef[Result]]) -> list[Result]:
    """Run rank 0's share while the other ranks run theirs; return all results, in the order of the ranks.

    If rank 0 failed only because another rank did, re-raise the other rank's error.
    """
    try:
        result = own()
    except RankError:
        for reference in pending:
            with suppress(RankError, RayActorError):
                ray.get(reference)
        raise
    return [result, *ray.get(list(pending))]
