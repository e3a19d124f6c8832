"""One rank of the learner: holds the three networks and does this rank's share of every operation.

The ranks' shares meet in `learner/training/ranks.py`. `learner/training/actor.py` calls all ranks at once.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from common.backbones import load_backbone
from common.backbones.base import parts_fingerprint
from common.config.run import Config
from common.errors import AttestationError
from common.group_ends import GroupFault
from common.heartbeat import Heartbeat
from common.learner_snapshot import LearnerSnapshot
from common.process_log import report_to_driver
from common.progress import STEP_LIMIT_S, WAIT_FOR_RANKS, Progress
from common.rewards.access import RewardAccess
from common.sealed_group import SealedGroup
from common.torch_device import peak_memory_bytes, release_cached
from common.types import FloatArray, Guidance, Position, ProcessPlace, Prompt, ScoredGroup, Stage
from common.weights import Payload, PublishedWeights, attestation_velocity, frozen_weights, publish
from common.wire import fingerprint, tensor_hashes
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.training.alignment_trainer import REWARD, AlignmentTrainer, Update
from learner.training.batch_metrics import Totals
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.lora_file import write_lora
from learner.training.networks import Networks, StageSettings
from learner.training.ranks import ALONE, Meeting, lost_ranks_named
from learner.training.reward_gradients import ServedRewards
from learner.training.thread_probe import timed_passes, training_pass, usable_cpus

LIMITS_S = {"attest": 600.0, "save": 600.0, "export": 600.0, WAIT_FOR_RANKS: math.inf}
"""Seconds that a step may take which waits for a network or a disk; others have `STEP_LIMIT_S`."""
EXIT_DELAY_S = 2.0
"""A rank whose process must end waits this long, so that Ray can send its error to rank 0 first."""


class LearnerRank:
    """Stage 1 from the start, stage 2 after `begin_alignment`.

    Every method is this rank's share: call it on all ranks, unless it says otherwise.
    """

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], rewards: RewardAccess, device: str, meeting: Meeting | None
    ) -> None:
        """Load everything. With a `meeting`, wait there for the other ranks.

        Raises:
            ModelError: see `load_backbone`.
        """
        if ray.is_initialized():
            report_to_driver()
        self._progress = Progress(ray.get_runtime_context().get_node_id() if ray.is_initialized() else "")
        self._call = self._progress.call()
        self._limits_s = LIMITS_S | {REWARD: STEP_LIMIT_S + rewards.longest_wait_s()}
        self._pass_limit_s = self._limits_s[REWARD] if config.learner.shard_base else STEP_LIMIT_S
        torch.set_num_threads(config.learner.threads or 1)
        self._config = config
        seed, sampling, cold_start = config.run.seed, config.sampling, config.cold_start
        self._ranks = ALONE if meeting is None else replace(meeting.join(), begin_step=self._begin_step)
        self._backbone = load_backbone(
            config.backbone, config.lora, torch.device(device), sharded=config.learner.shard_base
        )
        self._networks = Networks(self._backbone, StageSettings.of(cold_start), seed, self._ranks)
        self._cold_start = ColdStartTrainer(
            self._networks, cold_start, sampling, config.backbone.guidance_scale, prompts, seed, self._begin_step
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
            config.alignment.gap_limit(config.backbone.dtype),
            self._begin_step,
        )

    def ready(self) -> tuple[str, ProcessPlace]:
        """Return the fingerprint of the base once this rank is loaded, and where this process runs."""
        return self.base_fingerprint(), self._progress.place

    def heartbeat(self) -> Heartbeat:
        """The step that this rank is in. A thread of its own answers."""
        return self._progress.heartbeat()

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The backbone's schedule. Any rank can answer."""
        return self._backbone.sigmas(num_steps)

    def guidance(self) -> Guidance:
        """The backbone's kind of guidance. Any rank can answer."""
        return self._backbone.guidance

    def base_fingerprint(self) -> str:
        return self._backbone.base_fingerprint()

    def time_threads(self) -> dict[int, float]:
        """Median seconds of a training pass by the number of CPU threads. All ranks at once: they share the CPUs."""
        cold_start, alignment = self._config.cold_start, self._config.alignment
        batch = min(max(1, cold_start.batch_size // self._config.learner.ranks), alignment.micro_batch)
        return timed_passes(training_pass(self._networks, batch), usable_cpus())

    def use_threads(self, number: int) -> None:
        torch.set_num_threads(number)

    def cold_start(self, iteration: int) -> Totals:
        """Run one iteration of stage 1."""
        with self._failure_noticed(), self._work("cold_start"):
            return self._cold_start.update(iteration)

    def begin_alignment(self) -> None:
        """Freeze stage 1's averaged student and fake score, and add a fresh adapter to each."""
        self._networks.begin_alignment(StageSettings.of(self._config.alignment))

    def fetch_whole(self, group: Sequence[ray.ObjectRef[SealedGroup]]) -> GroupFault | None:
        """Fetch a group to this rank's machine; what is wrong with what has arrived, or None."""
        with self._work("attest"):
            try:
                sealed = ray.get(group[0])
            except RayError:
                return GroupFault.LOST
            return None if sealed.is_whole() else GroupFault.DAMAGED

    def align(self, groups: Sequence[ray.ObjectRef[SealedGroup]]) -> Update:
        """Run one iteration of stage 2 on attested groups; see `AlignmentTrainer.update`."""
        with self._failure_noticed(), self._work("align"):
            try:
                scored = _opened(ray.get(list(groups)))
            except (RayError, AttestationError):
                # The other ranks wait for this rank in the sum.
                with self._alignment.first_optimizer.gathering():
                    raise
            return self._alignment.update(scored)

    def publish(self, number: int, *, averaged: bool) -> PublishedWeights:
        """The student's weights as version `number`. Rank 0 only, see `attestation_pass`."""
        with self._failure_noticed(), self._work("publish"), self._published_student(averaged=averaged):
            return publish(self._backbone, number)

    def frozen_weights(self) -> Payload:
        """The student's weights that `publish` leaves out: they do not change within a stage. Any rank can answer."""
        return frozen_weights(self._backbone)

    def release_memory(self) -> None:
        """Give the memory of the update's passes to the workers on the same GPU."""
        release_cached(self._backbone.device)

    def attestation_pass(self, *, averaged: bool) -> None:
        """Take part in the forward pass of rank 0's `publish`. Other ranks only, if the base is sharded."""
        with self._failure_noticed(), self._work("publish"), self._published_student(averaged=averaged):
            attestation_velocity(self._backbone)

    def save(self, run_dir: Path, position: Position, settings: dict[str, Any]) -> Path:
        """Write a checkpoint. One rank only: all have the same state."""
        store, parts = CheckpointStore.of_run(run_dir), parts_fingerprint(self._backbone)
        with self._work("save"):
            return store.save(position, self._networks.state(), settings, self.base_fingerprint(), parts)

    def restore(self, directory: Path, settings: dict[str, Any] | None) -> Position:
        """Continue from a checkpoint; the learner must still be in stage 1.

        Raises:
            CheckpointError: see `Checkpoint`.
        """
        with self._work("restore"):
            checkpoint = Checkpoint.open(directory)
            if settings is not None:
                checkpoint.require_settings(settings)
            checkpoint.require_base(self.base_fingerprint(), parts_fingerprint(self._backbone))
            position = checkpoint.position
            if position.stage is Stage.ALIGNMENT:
                self.begin_alignment()
            self._networks.load(checkpoint.state())
            return position

    def snapshot(self, policies: Mapping[int, str]) -> LearnerSnapshot:
        """Everything that training has changed, and these policies. One rank only: all have the same state."""
        with self._work("snapshot"):
            state = self._state()
            return LearnerSnapshot(self._networks.stage, state, fingerprint(tensor_hashes(state)), policies)

    def load_snapshot(self, snapshot: Sequence[ray.ObjectRef[LearnerSnapshot]]) -> None:
        """Continue from a snapshot (a list of one reference); the learner must still be in stage 1.

        Raises:
            AttestationError: what is held now is not what the snapshot was made of.
        """
        with self._work("load_snapshot"):
            taken = ray.get(snapshot[0])
            if taken.stage is Stage.ALIGNMENT:
                self.begin_alignment()
            self._networks.load({name: torch.tensor(value) for name, value in taken.state.items()})
            if self.state_fingerprint() != taken.fingerprint:
                raise AttestationError(
                    f"a snapshot of {taken.stage} was damaged between two processes of the learner: look for failing "
                    "memory on its machine, and continue with --resume"
                )

    def state_fingerprint(self) -> str:
        """Hash of everything that training changes; equal on every rank."""
        return fingerprint(tensor_hashes(self._state()))

    def _state(self) -> dict[str, FloatArray]:
        state: dict[str, Tensor] = self._networks.state()
        return {name: value.cpu().numpy() for name, value in state.items()}

    def peak_bytes(self) -> int:
        """Peak memory of this rank, see `peak_memory_bytes`."""
        return peak_memory_bytes(self._backbone.device)

    def export(self, directory: Path) -> None:
        """Write the averaged student with `learner.training.lora_file.write_lora`. One rank only."""
        with self._work("export"), self._networks.averaged_student():
            write_lora(self._backbone, directory)

    @contextmanager
    def _work(self, step: str) -> Iterator[None]:
        """A call of this rank, which begins with this step."""
        with self._progress.call() as self._call:
            self._begin_step(step)
            yield

    def _begin_step(self, step: str) -> None:
        self._call.begin(step, self._limits_s.get(step, self._pass_limit_s))

    @contextmanager
    def _failure_noticed(self) -> Iterator[None]:
        """With a sharded base, the other ranks only notice a failure when this rank's process ends: end it.

        Rank 0 stays: the driver receives its error and ends the run.
        """
        try:
            yield
        except BaseException:
            if self._ranks.sharded and self._ranks.index > 0:
                threading.Timer(EXIT_DELAY_S, os._exit, [1]).start()
            raise

    @contextmanager
    def _published_student(self, *, averaged: bool) -> Iterator[None]:
        with lost_ranks_named("a publication"), self._networks.averaged_student() if averaged else nullcontext():
            yield


def _opened(groups: Sequence[SealedGroup]) -> list[ScoredGroup]:
    """AttestationError unless every group is still what its worker sealed."""
    for sealed in groups:
        if not sealed.is_whole():
            trajectory = sealed.group.trajectory
            raise AttestationError(
                f"the group of prompt {trajectory.prompt.index} in iteration {trajectory.plan.iteration} was damaged "
                "after it had been attested: look for failing memory on the learner's machine, and go on with --resume"
            )
    return [sealed.group for sealed in groups]
