"""Trains an arm in one process, with the samplers and trainers of the service and without Ray and HTTP."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.watchdog.arms import CONFIG, Options
from common import seeding
from common.backbones import load_backbone
from common.config.rewards import RewardConfig
from common.config.run import Config
from common.policies import student_spec
from common.prompts import load_prompts
from common.types import (
    ByteArray,
    EvaluatedPrompt,
    FloatArray,
    PolicyVersion,
    Position,
    Prompt,
    ScoredGroup,
    Stage,
    StepPlan,
    TrajectoryGroup,
)
from learner.driver.watchdog import WATCHDOG_FILE, Watchdog, Watched
from learner.objectives.reward_gradient import attach_gradient
from learner.preflight.command_line import parse
from learner.records.metrics_log import StepRecord, over_groups
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.networks import Networks, StageSettings
from learner.training.reward_gradients import DifferentiableRewards, InProcessRewards
from reward_servers.scorers import BUILT_IN_SCORERS
from reward_servers.scorers.base import Scorer
from rollout_workers.diversity import mean_pairwise_distance
from rollout_workers.image_statistics import image_statistics, with_agreement
from rollout_workers.sampler import decode_to_uint8, sample_for_evaluation, sample_group

EVALUATED_TOGETHER = 16
"""Prompts that are sampled together for an evaluation."""
SHOWN = ("reward/", "group_mean/")
"""Beginnings of the metrics that the console shows."""


class Rewards(InProcessRewards):
    """Every reward of a run in this process; the service asks reward servers instead."""

    def __init__(self, rewards: Sequence[RewardConfig]) -> None:
        self._scorers = {reward.name: _scorer(reward) for reward in rewards}
        self._trained = [reward.name for reward in rewards if reward.trained]
        self.names = tuple(reward.name for reward in rewards if reward.trained and reward.differentiable)

    def score(
        self, images: ByteArray, prompts: Sequence[Prompt], *, trained_only: bool = False
    ) -> dict[str, FloatArray]:
        """Score images of one prompt each."""
        names = self._trained if trained_only else list(self._scorers)
        texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
        return {name: self._scorers[name].score(images, texts, metadata) for name in names}

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
        scores = {}
        for name in self.names:
            found = self._scorers[name].score_with_gradient(images_BCHW.detach().numpy(), texts, metadata)
            scores_B, gradients_BCHW = map(torch.tensor, found)
            scores[name] = attach_gradient(scores_B, gradients_BCHW, images_BCHW)
        return DifferentiableRewards(scores)


def _scorer(reward: RewardConfig) -> Scorer:
    name = reward.scorer or ""
    module, _, scorer = BUILT_IN_SCORERS.get(name, name).partition(":")
    kind: type[Scorer] = vars(importlib.import_module(module))[scorer]
    return kind.load(reward.model, "cpu")


def config_of(options: Options) -> Config:
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]
    return parse(["--config", CONFIG, *words], {}).config


class Training:
    """One run: its networks, prompts and rewards."""

    def __init__(self, options: Options) -> None:
        self.config = config = config_of(options)
        torch.set_num_threads(1)
        self._backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
        self._networks = Networks(self._backbone, StageSettings.of(config.cold_start), config.run.seed)
        self._prompts = load_prompts(config.prompts.train)
        self._held_out = load_prompts(config.prompts.evaluation)[: config.evaluation.prompts]
        self._empty = self._backbone.encode_prompts([""])

    def cold_start(self, kept: Path) -> None:
        """Train stage 1, or load what was kept of it."""
        config, guidance = self.config, self.config.backbone.guidance_scale
        if not kept.exists():
            settings, seed = config.cold_start, config.run.seed
            trainer = ColdStartTrainer(self._networks, settings, config.sampling, guidance, self._prompts, seed)
            for iteration in range(settings.iterations):
                trainer.update(iteration)
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._networks.state(), kept)
        self._networks.load(load_file(kept))

    def align(self, run_dir: Path) -> dict[str, list[dict[str, Any]]]:
        """Train stage 2; return what metrics.jsonl has of its iterations, and the watchdog's evaluations."""
        config, align, seed = self.config, self.config.alignment, self.config.run.seed
        rewards = Rewards(config.rewards)
        self._networks.begin_alignment(StageSettings.of(align))
        guidance, weight = config.backbone.guidance_scale, align.consistency_weight
        matching = MatchingSettings.of(config.cold_start, config.sampling, guidance, weight)
        weights = {reward.name: reward.weight for reward in config.rewards if reward.trained}
        trainer = AlignmentTrainer(self._networks, align, matching, weights, rewards, seed)
        run_dir.mkdir(parents=True)
        watchdog, iterations = Watchdog(Watched.of(config), run_dir), []
        watchdog.add(Position(Stage.ALIGNMENT, 0), self._evaluate(rewards))
        for iteration in range(align.iterations):
            record = self._iterate(iteration, trainer, rewards)
            line = {"stage": Stage.ALIGNMENT, "iteration": iteration, "kind": "train"}
            print(f"iteration {iteration}: {_told(record.metrics)}", file=sys.stderr, flush=True)
            iterations.append({**line, "metrics": record.metrics, "seconds": record.seconds})
            if (iteration + 1) % config.evaluation.every == 0:
                watchdog.add(Position(Stage.ALIGNMENT, iteration + 1), self._evaluate(rewards))
        lines = map(json.loads, (run_dir / WATCHDOG_FILE).read_text().splitlines())
        return {"iterations": iterations, "evaluations": list(lines)}

    def _iterate(self, iteration: int, trainer: AlignmentTrainer, rewards: Rewards) -> StepRecord:
        config, align, seed = self.config, self.config.alignment, self.config.run.seed
        steps = config.sampling.steps
        selected = seeding.selected_steps(seed, iteration, steps - 1, align.selected_steps)
        plan = StepPlan(iteration, self._backbone.sigmas(steps), config.sampling.eta, selected)
        record, groups, statistics = StepRecord(), [], []
        with record.timed("step"):
            chosen = seeding.prompt_indices(seed, iteration, align.prompts_per_iteration, len(self._prompts))
            for prompt in (self._prompts[index] for index in chosen):
                sampled = sample_group(self._backbone, prompt, plan, seed=seed, group_size=align.group_size)
                images = decode_to_uint8(self._backbone, sampled.latents_SGchw[-1])
                arrays = sampled.latents_SGchw.numpy(), sampled.surrogate_TG.numpy()
                trajectory = TrajectoryGroup(prompt, plan, PolicyVersion(iteration, "local"), *arrays)
                scores = rewards.score(images, [prompt] * align.group_size, trained_only=True)
                with record.timed("statistics"):
                    statistics.append(with_agreement(image_statistics(torch.from_numpy(images)), scores))
                groups.append(ScoredGroup(trajectory, scores))
            totals = trainer.update(groups).totals
        record.metrics.update(totals.values() | over_groups(statistics))
        return record

    def _evaluate(self, rewards: Rewards) -> list[EvaluatedPrompt]:
        """The student as it is, without its moving average: the strictest view of what a reward has done to it."""
        spec, count, seed = student_spec(self.config), self.config.evaluation.images_per_prompt, self.config.run.seed
        evaluated = []
        for first in range(0, len(self._held_out), EVALUATED_TOGETHER):
            part = self._held_out[first : first + EVALUATED_TOGETHER]
            latents = sample_for_evaluation(self._backbone, part, spec, seed=seed, count=count, empty=self._empty)
            images = decode_to_uint8(self._backbone, latents)
            scores = rewards.score(images, [prompt for prompt in part for _ in range(count)])
            for place, prompt in enumerate(part):
                own = slice(place * count, (place + 1) * count)
                pixels = torch.from_numpy(images[own])
                features = self._backbone.image_features(pixels.permute(0, 3, 1, 2).float() / 255)
                diversity = mean_pairwise_distance(features)
                rewards_G = {name: values[own] for name, values in scores.items()}
                statistics = image_statistics(pixels)
                evaluated.append(EvaluatedPrompt(prompt, images[own], rewards_G, diversity, statistics))
        return evaluated


def _told(metrics: Mapping[str, float]) -> str:
    shown = ("reward/", "group_mean/")
    return "  ".join(
        f"{name.partition('/')[2]} {value:.3f}" for name, value in metrics.items() if name.startswith(shown)
    )
