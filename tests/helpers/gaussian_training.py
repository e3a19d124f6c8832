"""Both trainers on the Gaussian backbone: networks, settings, and groups that the sampler really made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common import seeding
from common.config.stages import AlignmentConfig, ColdStartConfig, SamplingConfig
from common.types import Network, PolicyVersion, Prompt, ScoredGroup, StepPlan, TrajectoryGroup
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, COLD_START, FAKE_SCORE, Networks, StageSettings
from learner.training.reward_gradients import DifferentiableRewards, InProcessRewards
from rollout_workers.sampler import sample_group
from tests.helpers.gaussian_backbone import ETA, SIGMAS, STEPS, GaussianBackbone

SEED = 5
GUIDANCE = 3.0
SAMPLING = SamplingConfig(steps=STEPS, eta=ETA)
PROMPTS = [Prompt(index, text) for index, text in enumerate(("1", "0.5", "-0.5", "0.25", "2", "1.5"))]
ONE_PROMPT = [Prompt(index, "1") for index in range(16)]
"""One distribution, and noise of its own for each."""
UNCLIPPED = {"gradient_clip_student": 1e9, "gradient_clip_fake": 1e9}


def cold_start_settings(**changes: object) -> ColdStartConfig:
    base = {"batch_size": 4, "student_every": 1, "consistency_weight": 0.25, **UNCLIPPED}
    return ColdStartConfig.model_validate(base | changes)


def alignment_settings(**changes: object) -> AlignmentConfig:
    base = {"prompts_per_iteration": 2, "group_size": 4, "weight_decay_student": 0.0, **UNCLIPPED}
    return AlignmentConfig.model_validate(base | changes)


def new_networks(settings: ColdStartConfig, side: int = 4) -> Networks:
    return Networks(GaussianBackbone(side), StageSettings.of(settings), SEED)


def scattered(state: Mapping[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """An adapter at random places, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {key: size * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def scatter(networks: Networks, names: Sequence[str], size: float = 0.1) -> None:
    """Move adapters off the teacher, so that student, teacher and fake score all differ."""
    bank = networks.backbone.adapters
    for seed, name in enumerate(names):
        bank.load(name, scattered(bank.state(name), size, seed))


def cold_start_trainer(
    networks: Networks, settings: ColdStartConfig, prompts: Sequence[Prompt] = PROMPTS
) -> ColdStartTrainer:
    return ColdStartTrainer(networks, settings, SAMPLING, GUIDANCE, prompts, SEED)


def aligned_networks(
    settings: AlignmentConfig, student: Mapping[str, Tensor], fake: Mapping[str, Tensor], side: int = 4
) -> Networks:
    """Networks in stage 2, whose frozen adapters are these."""
    networks = new_networks(cold_start_settings(), side)
    networks.average.load(student)
    networks.backbone.adapters.load(FAKE_SCORE, fake)
    networks.begin_alignment(StageSettings.of(settings))
    return networks


def scattered_networks(settings: AlignmentConfig) -> Networks:
    """Networks in stage 2 with all four adapters at random places."""
    empty = new_networks(cold_start_settings()).backbone.adapters
    parts = [scattered(empty.state(name), 0.1, seed) for seed, name in enumerate((COLD_START, FAKE_SCORE))]
    networks = aligned_networks(settings, *parts)
    scatter(networks, (ALIGNED, ALIGNED_FAKE_SCORE))
    return networks


class Served(InProcessRewards):
    """Two rewards with their graph, where servers would be asked."""

    def __init__(self, direction_c: Tensor, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._direction_c = direction_c.float()

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        return DifferentiableRewards(
            {name: value for name, value in self.score(images_BCHW).items() if name in self.names}
        )

    def score(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """linear: a . (mean pixel of the image); square: mean of its squares, whose gradient differs by sample."""
        return {
            "linear": images_BCHW.mean(dim=(2, 3)) @ self._direction_c,
            "square": images_BCHW.square().mean(dim=(1, 2, 3)),
        }


def alignment_trainer(
    networks: Networks, settings: AlignmentConfig, weights: Mapping[str, float], served: Served
) -> AlignmentTrainer:
    """A trainer whose cold start had another consistency weight than the alignment."""
    matching = MatchingSettings.of(cold_start_settings(), SAMPLING, GUIDANCE, settings.consistency_weight)
    return AlignmentTrainer(networks, settings, matching, dict(weights), served, SEED)


@torch.no_grad()
def scored_groups(
    networks: Networks,
    iteration: int,
    settings: AlignmentConfig,
    served: Served,
    prompts: Sequence[Prompt],
    selected: tuple[int, ...] | None = None,
) -> list[ScoredGroup]:
    """An iteration's groups, by the rollout workers' own sampler with the student as it is."""
    backbone = networks.backbone
    if selected is None:
        selected = seeding.selected_steps(SEED, iteration, STEPS - 1, settings.selected_steps)
    plan = StepPlan(iteration, SIGMAS, ETA, selected)
    groups = []
    for place in seeding.prompt_indices(SEED, iteration, settings.prompts_per_iteration, len(prompts)):
        sampled = sample_group(backbone, prompts[place], plan, seed=SEED, group_size=settings.group_size)
        rewards = served.score(backbone.decode(sampled.latents_SGchw[-1]))
        trajectory = TrajectoryGroup(
            prompts[place],
            plan,
            PolicyVersion(iteration, "unused"),
            sampled.latents_SGchw.numpy(),
            sampled.surrogate_TG.numpy(),
        )
        groups.append(ScoredGroup(trajectory, {name: value.numpy() for name, value in rewards.items()}))
    return groups


def gradients(networks: Networks, network: Network) -> dict[str, Tensor]:
    """The gradient that the last update of a network's trained adapter followed."""
    bank = networks.backbone.adapters
    parameters = bank.parameters(bank.stack(network)[-1])
    return {key: parameter.grad.double() for key, parameter in parameters.items()}
