"""Rollout worker: samples whole groups, has them scored, and samples for evaluations.

`learner/compose.py` makes a Ray actor of it. Every call carries the weights that it must run with, so any other worker
can repeat it. A worker holds two calls: while one is scored, the other uses the model. It swaps weights between groups,
never inside one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import ray
import torch

from common.backbones import load_backbone
from common.backbones.base import Backbone, RestsTeacher
from common.config.backbones import BackboneConfig
from common.config.run import LoraConfig
from common.errors import WeightUpdateError
from common.heartbeat import Heartbeat
from common.policies import SamplingSpec
from common.process_log import report_to_driver
from common.progress import Call, Progress
from common.rewards.access import RewardAccess
from common.sealed_group import SealedGroup
from common.torch_device import peak_memory_bytes, release_cached
from common.types import (
    ByteArray,
    EvaluatedPrompt,
    Network,
    ProcessPlace,
    Prompt,
    RolloutOutcome,
    ScoredGroup,
    ScoringFailure,
    StepPlan,
    TrajectoryGroup,
)
from common.weights import Payload, PublishedWeights
from rollout_workers.diversity import mean_pairwise_distance
from rollout_workers.group_picture import group_picture
from rollout_workers.image_statistics import image_statistics, with_agreement
from rollout_workers.model_thread import ModelThread
from rollout_workers.sampler import GroupNoise, decode_to_uint8, group_noise, sample_for_evaluation, sample_group
from rollout_workers.weight_receiver import VELOCITY_TOLERANCE, WeightReceiver


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker; none of the learner's settings are included."""

    backbone: BackboneConfig
    lora: LoraConfig
    rewards: RewardAccess
    trained_rewards: tuple[str, ...]
    seed: int
    threads: int
    device: str
    compiled: bool
    releases_memory: bool = False
    """Whether the memory of passes is given back to the GPU's other processes while the model is idle."""


class RolloutWorker:
    """Holds a backbone, a reward client and one version of the student's weights."""

    def __init__(self, settings: WorkerSettings) -> None:
        if ray.is_initialized():
            report_to_driver()
        self._settings = settings
        self._progress = Progress(ray.get_runtime_context().get_node_id() if ray.is_initialized() else "")
        self._model = ModelThread(when_idle=self._release)
        self._backbone = self._model.run(self._load)
        tolerance = VELOCITY_TOLERANCE[settings.backbone.dtype]
        self._receiver = WeightReceiver(self._backbone, tolerance)
        self._empty = self._model.run(lambda: self._backbone.encode_prompts([""]))
        # Kept open for the lifetime of the process.
        self._connections = ExitStack()
        self._rewards = self._connections.enter_context(settings.rewards.guard())

    def _release(self) -> None:
        if self._settings.releases_memory:
            release_cached(torch.device(self._settings.device))

    def _load(self) -> Backbone:
        settings = self._settings
        torch.set_num_threads(settings.threads)
        backbone = load_backbone(settings.backbone, settings.lora, torch.device(settings.device))
        if isinstance(backbone, RestsTeacher):
            backbone.rest_teacher()
        if settings.compiled:
            backbone.compile_blocks()
        return backbone

    def ready(self) -> tuple[str, ProcessPlace]:
        """Return the fingerprint of the base once the backbone is loaded, and where this process runs."""
        return self._backbone.base_fingerprint(), self._progress.place

    def heartbeat(self) -> Heartbeat:
        """The step that the worker is in, its view of the rewards, and its memory. A thread of its own answers."""
        peak_bytes = peak_memory_bytes(self._backbone.device)
        return replace(self._progress.heartbeat(), rewards=self._rewards.health(), peak_bytes=peak_bytes)

    def rollout(
        self,
        prompt: Prompt,
        plan: StepPlan,
        group_size: int,
        weights: PublishedWeights,
        frozen: Payload,
        *,
        pictured: bool = False,
    ) -> tuple[RolloutOutcome, SealedGroup | None]:
        """Sample one group with these weights and have every trained reward score it.

        With `pictured` the outcome has a picture of the group.

        Raises:
            WeightUpdateError, AttestationError: the weights did not take effect; the run must stop.
            RewardOutage: a reward under `pause` did not recover in time; the run must stop.
        """
        with self._progress.call() as call:
            return self._rollout(call, prompt, plan, group_size, weights, frozen, pictured=pictured)

    def _rollout(
        self,
        call: Call,
        prompt: Prompt,
        plan: StepPlan,
        group_size: int,
        weights: PublishedWeights,
        frozen: Payload,
        *,
        pictured: bool,
    ) -> tuple[RolloutOutcome, SealedGroup | None]:
        # While the model computes another group.
        noise = group_noise(self._backbone, prompt, plan, seed=self._settings.seed, group_size=group_size)
        sampled, idle_s = self._model.run_timed(lambda: self._sample(call, prompt, plan, noise, weights, frozen))
        trajectory, images, of_images = sampled
        call.seconds["idle"] = idle_s
        texts, metadata = [prompt.text] * group_size, [dict(prompt.metadata)] * group_size
        call.begin("score", self._settings.rewards.longest_wait_s())
        answers = self._rewards.score(images, texts, metadata, self._settings.trained_rewards)
        call.end()
        if answers.held_s > 0:
            call.seconds["held"] = answers.held_s
            call.seconds["score"] -= answers.held_s
        name = str(self._progress.place)
        if answers.failure is not None:
            failure = ScoringFailure.of(answers.failure)
            return RolloutOutcome(name, trajectory.policy, call.seconds, failure, reward_seconds=answers.seconds), None
        left_out = tuple(map(ScoringFailure.of, answers.left_out.values()))
        sealed = SealedGroup.of(ScoredGroup(trajectory, answers.values))
        outcome = RolloutOutcome(
            name,
            trajectory.policy,
            call.seconds,
            left_out=left_out,
            digest=sealed.digest,
            picture=group_picture(prompt.text, images, answers.values) if pictured else None,
            statistics=with_agreement(of_images, answers.values),
            reward_seconds=answers.seconds,
            reward_spreads={reward: float(scores_G.std()) for reward, scores_G in answers.values.items()},
        )
        return outcome, sealed

    def _sample(
        self, call: Call, prompt: Prompt, plan: StepPlan, noise: GroupNoise, weights: PublishedWeights, frozen: Payload
    ) -> tuple[TrajectoryGroup, ByteArray, dict[str, float]]:
        """One group, its images and their statistics, on the model's thread."""
        call.begin("weights")
        version = self._receiver.receive(weights, frozen)
        call.begin("rollout")
        seed, group_size = self._settings.seed, len(noise.initial_Gchw)
        sampled = sample_group(self._backbone, prompt, plan, seed=seed, group_size=group_size, noise=noise)
        call.begin("decode")
        images = decode_to_uint8(self._backbone, sampled.latents_SGchw[-1])
        # Copied before scoring, so that a device holds the latents of one group at a time.
        latents_SGchw, surrogate_TG = sampled.latents_SGchw.cpu().numpy(), sampled.surrogate_TG.cpu().numpy()
        call.begin("statistics")
        statistics = image_statistics(torch.from_numpy(images).to(self._backbone.device))
        call.end()
        return TrajectoryGroup(prompt, plan, version, latents_SGchw, surrogate_TG), images, statistics

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        spec: SamplingSpec,
        images_per_prompt: int,
        weights: PublishedWeights | None = None,
        frozen: Payload | None = None,
    ) -> list[EvaluatedPrompt]:
        """Sample prompts together under a policy, and score them; the teacher needs no `weights`.

        Raises:
            WeightUpdateError, AttestationError: the weights are missing or did not take effect.
            RewardError: a reward was not available; an evaluation never contains zeros for missing scores.
        """
        with self._progress.call() as call:
            images = self._model.run(
                lambda: self._sample_evaluation(call, prompts, spec, images_per_prompt, weights, frozen)
            )
            parts = images.reshape(len(prompts), images_per_prompt, *images.shape[1:])
            return [self._evaluated(call, prompt, part) for prompt, part in zip(prompts, parts, strict=True)]

    def _evaluated(self, call: Call, prompt: Prompt, images: ByteArray) -> EvaluatedPrompt:
        call.begin("score", self._settings.rewards.longest_wait_s())
        count = len(images)
        rewards = self._rewards.score_all(images, [prompt.text] * count, [dict(prompt.metadata)] * count)
        call.end()
        diversity, statistics = self._model.run(lambda: self._measured(call, images))
        return EvaluatedPrompt(prompt, images, rewards, diversity, statistics)

    def _sample_evaluation(
        self,
        call: Call,
        prompts: Sequence[Prompt],
        spec: SamplingSpec,
        images_per_prompt: int,
        weights: PublishedWeights | None,
        frozen: Payload | None,
    ) -> ByteArray:
        """The images of all prompts, on the model's thread."""
        call.begin("weights")
        if weights is not None:
            self._receiver.receive(weights, frozen)
        elif spec.network is not Network.TEACHER:
            raise WeightUpdateError(f"an evaluation of the {spec.network} needs its weights: publish them first")
        call.begin("evaluation")
        latents = sample_for_evaluation(
            self._backbone, prompts, spec, seed=self._settings.seed, count=images_per_prompt, empty=self._empty
        )
        images = decode_to_uint8(self._backbone, latents)
        call.end()
        return images

    def _measured(self, call: Call, images: ByteArray) -> tuple[float, dict[str, float]]:
        """Diversity and statistics of a prompt's images, on the model's thread."""
        call.begin("statistics")
        pixels = torch.from_numpy(images)
        features = self._backbone.image_features(pixels.permute(0, 3, 1, 2).float() / 255)
        measured = mean_pairwise_distance(features), image_statistics(pixels.to(self._backbone.device))
        call.end()
        return measured
