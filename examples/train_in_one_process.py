"""Trains both stages of RTDMD on the shapes world in one process, without Ray and HTTP.

    python examples/train_in_one_process.py [--section.key VALUE ...]

Takes a minute on one core, enough for stage 1 to gain, not for stage 2. The service does the same in many processes.
"""

import common  # noqa: F401  # isort: skip - before torch, see there
import sys

import numpy as np
import torch

from common import seeding
from common.backbones import load_backbone
from common.policies import student_spec
from common.prompts import load_prompts
from common.types import PolicyVersion, ScoredGroup, StepPlan, TrajectoryGroup
from learner.objectives.reward_gradient import attach_gradient
from learner.preflight.command_line import parse
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.networks import Networks, StageSettings
from learner.training.reward_gradients import DifferentiableRewards, InProcessRewards
from reward_servers.scorers.hps import HpsScorer
from rollout_workers.sampler import decode_to_uint8, sample_group, sample_pictures

STAGE_1 = "--cold_start.iterations 60 --cold_start.batch_size 8"
STAGE_2 = "--alignment.iterations 5 --alignment.prompts_per_iteration 4 --alignment.group_size 4"
config = parse([*STAGE_1.split(), *STAGE_2.split(), *sys.argv[1:]], {}).config  # deploy/runs/shapes.yaml, smaller
seed, sampling, align, guidance = config.run.seed, config.sampling, config.alignment, config.backbone.guidance_scale
prompts, held_out = load_prompts(config.prompts.train), load_prompts(config.prompts.evaluation)[:16]
# Teacher, student and fake score share one frozen base. Student and fake score are LoRA adapters on it.
backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
networks = Networks(backbone, StageSettings.of(config.cold_start), seed)
hps = HpsScorer.load(next(reward.model for reward in config.rewards if reward.name == "hps"), "cpu")


def held_out_reward():
    """Mean reward of the student on prompts it does not train on, always from the same noise."""
    how = {"spec": student_spec(config), "seed": seed, "count": 1, "empty": backbone.encode_prompts([""])}
    images = [sample_pictures(backbone, prompt, **how) for prompt in held_out]
    return hps.score(np.concatenate(images), [prompt.text for prompt in held_out], [{}] * len(held_out)).mean()


class InProcessReward(InProcessRewards):
    """The reward with its gradient; the service asks a reward server instead."""

    def __init__(self):
        self.names = ("hps",)

    def differentiable(self, images_BCHW, prompts):
        texts, pixels = [prompt.text for prompt in prompts], images_BCHW.detach().numpy()
        as_tensors = map(torch.tensor, hps.score_with_gradient(pixels, texts, [{}] * len(texts)))
        return DifferentiableRewards({"hps": attach_gradient(*as_tensors, images_BCHW)})


# Stage 1, AC-DMD: the fake score follows the student's samples, and the student moves from it towards the teacher.
print(f"held-out reward at the start: {held_out_reward():.3f}", flush=True)
cold_start = ColdStartTrainer(networks, config.cold_start, sampling, guidance, prompts, seed)
for iteration in range(config.cold_start.iterations):
    metrics = cold_start.update(iteration).values()
print(f"teacher distance {metrics['teacher_distance']:.3f}, held-out reward after stage 1: {held_out_reward():.3f}")
# Stage 2, RTDMD: SubGRPO on selected noisy steps; matching and the reward's gradient on the last, noiseless step.
networks.begin_alignment(StageSettings.of(align))
matching = MatchingSettings.of(config.cold_start, sampling, guidance, align.consistency_weight)
alignment = AlignmentTrainer(networks, align, matching, {"hps": 1.0}, InProcessReward(), seed)
for iteration in range(align.iterations):
    selected = seeding.selected_steps(seed, iteration, sampling.steps - 1, align.selected_steps)
    plan, groups = StepPlan(iteration, backbone.sigmas(sampling.steps), sampling.eta, selected), []
    for index in seeding.prompt_indices(seed, iteration, align.prompts_per_iteration, len(prompts)):
        group = sample_group(backbone, prompts[index], plan, seed=seed, group_size=align.group_size)
        images, texts = decode_to_uint8(backbone, group.latents_SGchw[-1]), [prompts[index].text] * align.group_size
        arrays, version = (group.latents_SGchw.numpy(), group.surrogate_TG.numpy()), PolicyVersion(iteration, "local")
        trajectory = TrajectoryGroup(prompts[index], plan, version, *arrays)
        groups.append(ScoredGroup(trajectory, {"hps": hps.score(images, texts, [{}] * len(texts))}))
    metrics = alignment.update(groups)[0].values()
    print(f"alignment {iteration}: reward {metrics['reward/hps']:.3f}, distance {metrics['teacher_distance']:.3f}")
print(f"held-out reward after stage 2: {held_out_reward():.3f}")
