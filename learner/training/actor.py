"""The learner: holds the three networks, updates them and publishes the student's weights.

Plain Python. `learner/driver/learner_group.py` makes Ray actors of it: one, or several ranks that share every update
(`learner/training/ranks.py`). The driver only calls rank 0, which forwards to the other ranks what all must do.
Scored groups arrive as object references: they go from the workers to the learner without passing the driver.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from torch import Tensor

from common.backbones import load_backbone
from common.config.run import Config
from common.errors import AttestationError, RankError
from common.rewards.access import RewardAccess
from common.types import Guidance, Position, Prompt, ScoredGroup, Stage, UpdateResult
from common.weights import PublishedWeights, probe_velocity, publish
from common.wire import fingerprint, tensor_hashes
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.batch_metrics import Totals
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.group_provenance import PublishedPolicies
from learner.training.lora_file import write_lora
from learner.training.networks import Networks, StageSettings
from learner.training.ranks import ALONE, Meeting, lost_ranks_named
from learner.training.reward_gradients import ServedRewards

LAST_WORDS_S = 2.0


class Learner:
    """Stage 1 from the start, stage 2 after `begin_alignment`."""

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], rewards: RewardAccess, device: str, meeting: Meeting | None
    ) -> None:
        """Load everything. With a `meeting`, wait there for the other ranks.

        Raises:
            ModelError: see `load_backbone`.
        """
        torch.set_num_threads(config.learner.threads)
        self._others: Sequence[ActorHandle] = ()
        self._publish_seconds = 0.0
        self._published = PublishedPolicies(config.alignment.max_staleness)
        self._config = config
        seed, sampling, cold_start = config.run.seed, config.sampling, config.cold_start
        self._ranks = ALONE if meeting is None else meeting.join()
        self._backbone = load_backbone(
            config.backbone, config.lora, torch.device(device), sharded=config.learner.shard_base
        )
        self._networks = Networks(self._backbone, StageSettings.of(cold_start), seed, self._ranks)
        self._cold_start = ColdStartTrainer(
            self._networks, cold_start, sampling, config.backbone.guidance_scale, prompts, seed
        )
        # Kept open for the lifetime of the process.
        self._connections = ExitStack()
        guard = self._connections.enter_context(rewards.guard())
        trained = {reward.name: reward for reward in config.rewards if reward.trained}
        self._alignment = AlignmentTrainer(
            self._networks,
            config.alignment,
            MatchingSettings.of(
                cold_start, sampling, config.backbone.guidance_scale, config.alignment.consistency_weight
            ),
            {name: reward.weight for name, reward in trained.items()},
            ServedRewards(guard, [name for name, reward in trained.items() if reward.differentiable]),
            seed,
        )

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The backbone's schedule; it returns once the backbone is loaded."""
        return self._backbone.sigmas(num_steps)

    def guidance(self) -> Guidance:
        """The backbone's kind of guidance."""
        return self._backbone.guidance

    def base_fingerprint(self) -> str:
        return self._backbone.base_fingerprint()

    def lead(self, others: Sequence[ActorHandle]) -> None:
        """Make this rank 0, the rank that the driver calls, over itself and `others`."""
        self._others = others

    def cold_start(self, iteration: int) -> UpdateResult:
        """Run one iteration of stage 1."""
        pending = [other.cold_start_share.remote(iteration) for other in self._others]
        with _cause_of_failure(pending):
            own = self.cold_start_share(iteration)
        return UpdateResult(Totals.merged([own, *ray.get(pending)]).values(), {})

    def cold_start_share(self, iteration: int) -> Totals:
        """Run this rank's share of the iteration."""
        with self._last_words():
            return self._cold_start.update(iteration)

    def begin_alignment(self) -> None:
        """Freeze stage 1's averaged student and fake score, and add a fresh adapter to each."""
        pending = [other.begin_alignment.remote() for other in self._others]
        self._networks.begin_alignment(StageSettings.of(self._config.alignment))
        ray.get(pending)

    def align(self, groups: Sequence[ray.ObjectRef[ScoredGroup]]) -> UpdateResult:
        """Run one iteration of stage 2.

        Raises:
            AttestationError: the groups were not sampled with the right plan and weights; nothing has changed then.
            RewardError, TrainingError, RankError: see `AlignmentTrainer.update`.
        """
        scored: list[ScoredGroup] = ray.get(list(groups))
        self._published.attest(scored)
        pending = [other.align_share.remote(groups) for other in self._others]
        with _cause_of_failure(pending):
            own, seconds = self._alignment.update(scored)
        metrics = Totals.merged([own, *ray.get(pending)]).values()
        return UpdateResult(metrics, {**seconds, "publish": self._publish_seconds})

    def align_share(self, groups: Sequence[ray.ObjectRef[ScoredGroup]]) -> Totals:
        """Run this rank's share of the iteration; rank 0 has attested the groups."""
        with self._last_words():
            try:
                scored = ray.get(list(groups))
            except RayError:
                # The other ranks wait for this rank in the sum.
                with self._networks.fake_optimizer.gathering():
                    raise
            totals, _ = self._alignment.update(scored)
        return totals

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """With a sharded base, the other ranks only notice a failure when this rank's process ends: end it."""
        try:
            yield
        except BaseException:
            if self._ranks.sharded:
                # The timer gives Ray time to send the error to rank 0.
                threading.Timer(LAST_WORDS_S, os._exit, [1]).start()
            raise

    def publish(self, number: int, *, averaged: bool) -> PublishedWeights:
        """The student's weights as version `number`: the trained ones, or their moving average for evaluation."""
        started = time.perf_counter()
        pending = [other.publish_share.remote(averaged=averaged) for other in self._others if self._ranks.sharded]
        with _cause_of_failure(pending), self._published_student(averaged=averaged):
            published = publish(self._backbone, number)
        ray.get(pending)
        if not averaged:
            self._published.remember(published.manifest.version)
        self._publish_seconds = time.perf_counter() - started
        return published

    def publish_share(self, *, averaged: bool) -> None:
        """Compute this rank's part of the probe, if the base is sharded."""
        with self._last_words(), self._published_student(averaged=averaged):
            probe_velocity(self._backbone)

    @contextmanager
    def _published_student(self, *, averaged: bool) -> Iterator[None]:
        with lost_ranks_named("a publication"), self._networks.averaged_student() if averaged else nullcontext():
            yield

    def save(self, run_dir: Path, position: Position, settings: dict[str, Any]) -> Path:
        """Write a checkpoint.

        Raises:
            AttestationError: another rank has different weights or moments; nothing is written then.
        """
        state = self._networks.state()
        for index, theirs in enumerate(ray.get([other.state_fingerprint.remote() for other in self._others]), 1):
            if theirs != _fingerprint(state):
                raise AttestationError(
                    f"rank {index} of the learner has drifted from rank 0 before {position.directory}: continue from "
                    "the checkpoint before it with --resume"
                )
        return CheckpointStore.of_run(run_dir).save(position, state, settings, self.base_fingerprint())

    def state_fingerprint(self) -> str:
        """Hash of everything that training changes; equal on every rank."""
        return _fingerprint(self._networks.state())

    def restore(self, directory: Path, settings: dict[str, Any] | None) -> Position:
        """Continue from a checkpoint; the learner must still be in stage 1.

        Raises:
            CheckpointError: see `Checkpoint`.
        """
        pending = [other.restore.remote(directory, settings) for other in self._others]
        checkpoint = Checkpoint.open(directory)
        if settings is not None:
            checkpoint.require_settings(settings)
        checkpoint.require_base(self.base_fingerprint())
        position = checkpoint.position
        if position.stage is Stage.ALIGNMENT:
            # Only its own networks: the other ranks restore themselves.
            self._networks.begin_alignment(StageSettings.of(self._config.alignment))
        self._networks.load(checkpoint.state())
        ray.get(pending)
        return position

    def peak_gib(self) -> float:
        """Peak memory of this rank: of its GPU, or without a GPU of the process."""
        if self._backbone.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def export(self, directory: Path) -> None:
        """Write the averaged student as a LoRA in diffusers' format, see `learner.training.lora_file.write_lora`."""
        with self._networks.averaged_student():
            write_lora(self._backbone, directory)


@contextmanager
def _cause_of_failure(pending: Sequence[ray.ObjectRef[Any]]) -> Iterator[None]:
    """If this rank failed only because another did, re-raise the other rank's error."""
    try:
        yield
    except RankError:
        for reference in pending:
            with suppress(RankError, RayActorError):
                ray.get(reference)
        raise


def _fingerprint(state: dict[str, Tensor]) -> str:
    return fingerprint(tensor_hashes({name: value.cpu().numpy() for name, value in state.items()}))
