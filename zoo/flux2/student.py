"""Start of the second family's student: the teacher's weights, trained to follow its guided trajectories in 4 steps.

FLUX.2-klein's published student starts from a 4-step model; this model takes its place. A trajectory leads from noise
to image in 28 guided steps, which include the student's noise levels. The student learns the mean velocity from one of
its levels to the next. This is least squares: where trajectories separate late, it draws their mean, which RTDMD can
improve.
"""

from __future__ import annotations

import copy
import itertools
import random

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from torch.nn import functional

from common.flow import exponential_shift_sigmas, flux2_mu
from zoo.flow_training import Rates, half_precision, train_averaged
from zoo.flux2.autoencoder import PATCH_CHANNELS, SIDE
from zoo.flux2.teacher import BATCH, TEACHER_STEPS, velocity
from zoo.flux2.text_encoder import encode_captions
from zoo.measuring import GUIDANCE
from zoo.world.scenes import sample_grid_scene

STUDENT_STEPS = 4
STRIDE = TEACHER_STEPS // STUDENT_STEPS
TRAJECTORIES = 3_072
STEPS = 1_200
RATES = Rates(matrices=2e-3, others=4e-4, ema_decay=0.99)
SIGMAS = exponential_shift_sigmas(TEACHER_STEPS, flux2_mu(SIDE**2, STUDENT_STEPS))
"""The teacher's levels with the shift of 4 steps, so that every seventh level is one of the student's."""


def distil_student(pipeline: Flux2KleinPipeline, seed: int, steps: int = STEPS) -> Flux2Transformer2DModel:
    """Train a 4-step transformer from the pipeline's 28-step one with guidance."""
    torch.manual_seed(seed)
    rng = random.Random(seed + 20)
    captions = encode_captions(pipeline, [sample_grid_scene(rng).caption for _ in range(TRAJECTORIES)])
    empty = encode_captions(pipeline, [""])
    walks = [guided_walk(pipeline.transformer, part.float(), empty.float()) for part in captions.split(BATCH)]
    student = copy.deepcopy(pipeline.transformer).train().requires_grad_(True)
    levels_NTchw = torch.cat(walks)
    return train_averaged(student, lambda: walking_loss(student, levels_NTchw, captions), steps, RATES)


@torch.no_grad()
def guided_walk(teacher: Flux2Transformer2DModel, captions_BLd: Tensor, empty_1Ld: Tensor) -> Tensor:
    """The teacher's guided trajectories from fresh noise, at the student's levels: [B, T + 1, c, h, w]."""
    count = len(captions_BLd)
    sample = torch.randn(count, PATCH_CHANNELS, SIDE, SIDE)
    both = torch.cat([captions_BLd, empty_1Ld.expand_as(captions_BLd)])
    visited = [sample]
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(SIGMAS), start=1):
        with half_precision():
            predicted = velocity(teacher, sample.repeat(2, 1, 1, 1), torch.full((2 * count,), sigma), both)
        conditional, unconditional = predicted.float().chunk(2)
        sample = sample + (sigma_next - sigma) * (unconditional + GUIDANCE * (conditional - unconditional))
        if step % STRIDE == 0:
            visited.append(sample)
    return torch.stack(visited, 1)


def walking_loss(student: Flux2Transformer2DModel, levels_NTchw: Tensor, captions_NLd: Tensor) -> Tensor:
    """Mean squared error of the velocity from one level to the next, for a random batch of trajectories and levels."""
    rows = torch.randint(len(levels_NTchw), (BATCH,))
    steps = torch.randint(STUDENT_STEPS, (BATCH,))
    levels = torch.tensor(SIGMAS[::STRIDE])
    sigma, sigma_next = levels[steps], levels[steps + 1]
    start, end = levels_NTchw[rows, steps], levels_NTchw[rows, steps + 1]
    mean_velocity = (end - start) / (sigma_next - sigma)[:, None, None, None]
    with half_precision():
        predicted = velocity(student, start, sigma, captions_NLd[rows].float())
    return functional.mse_loss(predicted.float(), mean_velocity)
