"""Training on the tiny pipeline: networks, trainers, groups that the sampler really made, rewards known by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from common import seeding
from common.backbones.base import Backbone
from common.config.stages import AlignmentConfig, ColdStartConfig, SamplingConfig
from common.types import PolicyVersion, Prompt, ScoredGroup, StepPlan, TrajectoryGroup
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.networks import Networks, StageSettings
from learner.training.ranks import ALONE, Ranks
from learner.training.reward_gradients import DifferentiableRewards, InProcessRewards
from rollout_workers.sampler import sample_group
from tests.helpers.tiny_pipeline import load_tiny_backbone

PROMPTS = [Prompt(index, text) for index, text in enumerate(("red", "blue", "a dot", "two", "big", "small"))]
SAMPLING = SamplingConfig(steps=4, eta=0.9)
GUIDANCE = 3.0
REWARDS = {"left": 1.0, "bright": 0.5}
"""left: the latents' first channel, told to the sampler alone; bright: mean pixel, differentiable."""


def cold_start_settings(**changes: object) -> ColdStartConfig:
    base = {"batch_size": 4, "student_every": 1, "learning_rate_student": 1e-3, "learning_rate_fake": 1e-3}
    return ColdStartConfig.model_validate(base | changes)


def alignment_settings(**changes: object) -> AlignmentConfig:
    base = {
        "prompts_per_iteration": 2,
        "group_size": 3,
        "matching_weight": 0.3,
        "reward_gradient_weight": 0.05,
        "learning_rate_student": 1e-3,
        "learning_rate_fake": 1e-3,
        "weight_decay_student": 0.0,  # so that what changes had a gradient
        "ema_every": 1,
        "micro_batch": 4,
    }
    return AlignmentConfig.model_validate(base | changes)


def new_networks(pipeline: Path, settings: ColdStartConfig | None = None, ranks: Ranks = ALONE) -> Networks:
    backbone = load_tiny_backbone(pipeline, sharded=ranks.sharded)
    return Networks(backbone, StageSettings.of(settings or cold_start_settings()), 0, ranks)


def cold_start_trainer(networks: Networks, settings: ColdStartConfig | None = None) -> ColdStartTrainer:
    return ColdStartTrainer(networks, settings or cold_start_settings(), SAMPLING, GUIDANCE, PROMPTS, seed=0)


class Brightness(InProcessRewards):
    """Mean pixel value, with its graph, where a server would be asked."""

    def __init__(self) -> None:
        self.names = ("bright",)

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        assert len(images_BCHW) == len(prompts)
        return DifferentiableRewards({"bright": images_BCHW.mean(dim=(1, 2, 3))})


def alignment_trainer(
    networks: Networks,
    settings: AlignmentConfig | None = None,
    rewards: Mapping[str, float] = REWARDS,
    served: InProcessRewards | None = None,
    surrogate_gap_limit: float = math.inf,
) -> AlignmentTrainer:
    """A trainer in stage 2; `networks` must have begun it."""
    settings = settings or alignment_settings()
    matching = MatchingSettings.of(cold_start_settings(), SAMPLING, GUIDANCE, settings.consistency_weight)
    return AlignmentTrainer(networks, settings, matching, dict(rewards), served or Brightness(), 0, surrogate_gap_limit)


@torch.no_grad()
def scored_groups(backbone: Backbone, iteration: int, settings: AlignmentConfig | None = None) -> list[ScoredGroup]:
    """An iteration's groups, sampled by the rollout workers' own sampler with the student as it is."""
    settings = settings or alignment_settings()
    selected = (0, 1, 2)
    if settings.policy_gradient == "subgrpo":
        selected = seeding.selected_steps(0, iteration, 3, settings.selected_steps)
    plan = StepPlan(iteration, backbone.sigmas(SAMPLING.steps), SAMPLING.eta, selected)
    chosen = seeding.prompt_indices(0, iteration, settings.prompts_per_iteration, len(PROMPTS))
    groups = []
    for index in chosen:
        sampled = sample_group(backbone, PROMPTS[index], plan, seed=0, group_size=settings.group_size)
        trajectory = TrajectoryGroup(
            PROMPTS[index],
            plan,
            PolicyVersion(iteration, "unused"),
            sampled.latents_SGchw.numpy(),
            sampled.surrogate_TG.numpy(),
        )
        final = sampled.latents_SGchw[-1]
        rewards = {"left": final[:, 0].mean(dim=(1, 2)), "bright": backbone.decode(final).mean(dim=(1, 2, 3))}
        groups.append(ScoredGroup(trajectory, {name: value.numpy() for name, value in rewards.items()}))
    return groups


def snapshot(backbone: Backbone) -> dict[str, Tensor]:
    """A copy of every parameter of the transformers, adapters included."""
    return {name: parameter.detach().clone() for name, parameter in _parameters(backbone)}


def changed(backbone: Backbone, before: Mapping[str, Tensor]) -> set[str]:
    after = snapshot(backbone)
    return {name for name in after if not torch.equal(after[name], before[name])}


def trainable(backbone: Backbone) -> set[str]:
    return {name for name, parameter in _parameters(backbone) if parameter.requires_grad}


def _parameters(backbone: Backbone) -> Iterator[tuple[str, Parameter]]:
    """`base.path` of each parameter of each base."""
    for base, module in enumerate(backbone.adapters.modules()):
        yield from ((f"{base}.{name}", parameter) for name, parameter in module.named_parameters())
