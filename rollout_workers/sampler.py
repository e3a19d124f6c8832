"""Pure sampling: the result depends only on backbone, prompt, plan and seed.

Shape suffixes: see `common/types.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Backbone, Conditioning, guided_velocity
from common.backbones.device.transfer import pinned, to_device
from common.flow import surrogate_log_density
from common.policies import SamplingSpec
from common.sampling import step_transition
from common.types import ByteArray, Network, Prompt, StepPlan, steps_between


@dataclass(frozen=True)
class SampledGroup:
    """latents_SGchw [T + 1, G, c, h, w] and surrogate_TG [T, G], float32 on the backbone's device."""

    latents_SGchw: Tensor
    surrogate_TG: Tensor


@dataclass(frozen=True)
class GroupNoise:
    """The noise of one group on the host: its initial latents, and the noise of each step, all [G, c, h, w]."""

    initial_Gchw: Tensor
    steps_Gchw: tuple[Tensor, ...]


def group_noise(backbone: Backbone, prompt: Prompt, plan: StepPlan, *, seed: int, group_size: int) -> GroupNoise:
    """Draw the noise of one group, a function of the keys alone. Any thread may do so before the model is free.

    On the plan's selected steps every sample has its own noise; on the other steps the group shares one draw (SubGRPO).
    """
    shape, device = backbone.latent_shape, backbone.device
    key = seed, plan.iteration, prompt.index
    initial = seeding.initial_noise_Gchw(*key, group_size, shape, shared=plan.same_latent)
    steps = (
        seeding.step_noise_Gchw(*key, index, group_size, shape, shared=step.shared_noise)
        for index, step in enumerate(plan.steps)
    )
    return GroupNoise(pinned(initial, device), tuple(pinned(noise, device) for noise in steps))


@torch.no_grad()
def sample_group(
    backbone: Backbone,
    prompt: Prompt,
    plan: StepPlan,
    *,
    seed: int,
    group_size: int,
    noise: GroupNoise | None = None,
) -> SampledGroup:
    """Sample one group with the student. Its text is encoded once; `noise` is its `group_noise` if that is drawn."""
    noise = noise or group_noise(backbone, prompt, plan, seed=seed, group_size=group_size)
    conditioning = backbone.encode_prompts([prompt.text]).expand_to(group_size)
    latents = to_device(noise.initial_Gchw, backbone.device)

    def student(latents_Gchw: Tensor, sigma_G: Tensor) -> Tensor:
        return backbone.velocity(Network.STUDENT, latents_Gchw, sigma_G, conditioning)

    states, surrogates = [latents], []
    for step, noise_Gchw in zip(plan.steps, noise.steps_Gchw, strict=True):
        transition = step_transition(student, latents, step)
        latents = transition.sample(to_device(noise_Gchw, backbone.device))
        states.append(latents)
        surrogates.append(surrogate_log_density(transition.mean_Bchw, latents))
    return SampledGroup(torch.stack(states), torch.stack(surrogates))


@torch.no_grad()
def sample_for_evaluation(
    backbone: Backbone, prompts: Sequence[Prompt], spec: SamplingSpec, *, seed: int, count: int, empty: Conditioning
) -> Tensor:
    """Final latents [P * count, c, h, w], those of a prompt in a row, of prompts that share every forward pass.

    All policies start from the same noise, so images compare.
    """
    conditioning = Conditioning.concatenate([backbone.encode_prompts([prompt.text]) for prompt in prompts])
    conditioning = conditioning.repeat(count)
    shape = backbone.latent_shape
    noise = [seeding.initial_noise_Gchw(seed, EVALUATION, prompt.index, count, shape) for prompt in prompts]
    latents = to_device(torch.cat(noise), backbone.device)

    def policy(latents_Bchw: Tensor, sigma_B: Tensor) -> Tensor:
        return guided_velocity(backbone, spec.network, latents_Bchw, sigma_B, conditioning, empty, spec.guidance)

    for index, step in enumerate(steps_between(backbone.sigmas(spec.num_steps), spec.eta)):
        noise = [
            seeding.step_noise_Gchw(seed, EVALUATION, prompt.index, index, count, shape, shared=False)
            for prompt in prompts
        ]
        latents = step_transition(policy, latents, step).sample(to_device(torch.cat(noise), backbone.device))
    return latents


def sample_pictures(
    backbone: Backbone, prompt: Prompt, spec: SamplingSpec, *, seed: int, count: int, empty: Conditioning
) -> ByteArray:
    """`sample_for_evaluation` of one prompt with decoded images: uint8 [count, H, W, C]."""
    latents = sample_for_evaluation(backbone, [prompt], spec, seed=seed, count=count, empty=empty)
    return decode_to_uint8(backbone, latents)


@torch.no_grad()
def decode_to_uint8(backbone: Backbone, latents_Bchw: Tensor) -> ByteArray:
    """Images as displayed and scored: uint8 [B, H, W, C]."""
    images_BCHW = (backbone.decode(latents_Bchw) * 255).round().byte()
    # Transposed where they are: on a host this takes longer than the copy.
    images_BHWC: ByteArray = images_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return images_BHWC


EVALUATION = -1
"""The random keys of evaluations use this iteration: no training iteration has it, and every evaluation repeats it."""
