"""The learner: one process that holds the three networks, updates them and publishes the student's weights.

Plain Python; `learner/main.py` makes a Ray actor of it. Scored groups arrive as object references, so that they travel
from the workers to this process without passing through the driver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from common.backbones import load_backbone
from common.backbones.adapters import stacked_state
from common.backbones.base import Network
from common.config import Config
from common.reward_access import RewardAccess
from common.types import Prompt, ScoredGroup
from common.weights import PublishedWeights, publish
from learner.alignment_trainer import AlignmentTrainer
from learner.attestation import PublishedPolicies
from learner.checkpoint import Position, read_checkpoint, write_checkpoint
from learner.cold_start_trainer import ColdStartTrainer
from learner.matching import MatchingSettings
from learner.networks import Networks, OptimizerSettings
from learner.served_rewards import ServedRewards


@dataclass(frozen=True)
class UpdateResult:
    """What one update reports: metrics by name, seconds by part."""

    metrics: dict[str, float]
    seconds: dict[str, float]


class Learner:
    """Stage 1 from the start, stage 2 after `begin_alignment`."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        rewards: RewardAccess,
        device: str,
    ) -> None:
        torch.set_num_threads(config.learner.threads)
        self._publish_seconds = 0.0
        self._published = PublishedPolicies(config.alignment.max_staleness)
        self._config = config
        seed, sampling, cold_start = config.run.seed, config.sampling, config.cold_start
        self._backbone = load_backbone(config.backbone, config.lora, torch.device(device))
        self._networks = Networks(self._backbone, OptimizerSettings.of(cold_start), seed)
        self._cold_start = ColdStartTrainer(
            self._networks, cold_start, sampling, config.backbone.guidance_scale, prompts, seed
        )
        # Open as long as the process lives.
        self._connections = ExitStack()
        guard = self._connections.enter_context(rewards.guard())
        trained = {reward.name: reward for reward in config.rewards if reward.trained}
        self._alignment = AlignmentTrainer(
            self._networks,
            config.alignment,
            MatchingSettings.of(cold_start, sampling, config.backbone.guidance_scale),
            {name: reward.weight for name, reward in trained.items()},
            ServedRewards(guard, [name for name, reward in trained.items() if reward.differentiable]),
            seed,
        )

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The backbone's schedule; answered once the backbone is loaded."""
        return self._backbone.sigmas(num_steps)

    def base_fingerprint(self) -> str:
        return self._backbone.base_fingerprint()

    def cold_start(self, iteration: int) -> UpdateResult:
        """One iteration of stage 1."""
        return UpdateResult(self._cold_start.update(iteration), {})

    def begin_alignment(self) -> None:
        """Freeze stage 1's averaged student and put a fresh adapter on it."""
        self._networks.begin_alignment(OptimizerSettings.of(self._config.alignment))

    def align(self, groups: Sequence[ray.ObjectRef[ScoredGroup]]) -> UpdateResult:
        """One iteration of stage 2.

        Raises:
            AttestationError: the groups were not sampled as they should have been; nothing has changed then.
            RewardError, TrainingError: see `AlignmentTrainer.update`.
        """
        scored: list[ScoredGroup] = ray.get(list(groups))
        self._published.attest(scored)
        metrics, seconds = self._alignment.update(scored)
        return UpdateResult(metrics, {**seconds, "publish": self._publish_seconds})

    def publish(self, number: int, *, averaged: bool) -> PublishedWeights:
        """The student's weights as version `number`: as they train, or their moving average for evaluation."""
        started = time.perf_counter()
        with self._networks.averaged_student() if averaged else nullcontext():
            published = publish(self._backbone, number)
        if not averaged:
            self._published.remember(published.manifest.version)
        self._publish_seconds = time.perf_counter() - started
        return published

    def save(self, root: Path, position: Position, settings: dict[str, Any]) -> Path:
        return write_checkpoint(root, position, self._networks.state(), settings, self.base_fingerprint())

    def restore(self, directory: Path, settings: dict[str, Any] | None) -> Position:
        """Continue from a checkpoint; the learner must be in stage 1 still.

        Raises:
            CheckpointError: see `read_checkpoint`.
        """
        position, state = read_checkpoint(directory, settings, self.base_fingerprint())
        if position.stage == "alignment":
            self.begin_alignment()
        self._networks.load(state)
        return position

    def export(self, directory: Path) -> None:
        """Write the averaged student as one LoRA in diffusers' format; a stack becomes one of its total rank."""
        bank = self._backbone.adapters
        with self._networks.averaged_student():
            states = [bank.state(name) for name in bank.stack(Network.STUDENT)]
        self._backbone.save_lora(directory, stacked_state(states), bank.scale)
