"""Counts of the student's pass over those of the plain pipeline's, at full width with few blocks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.count import ETA, STEPS, add_student, count, kept, over
from benchmarks.counted_update import count_update
from benchmarks.counting import DEVICE, counted
from benchmarks.weightless import MODELS
from common.backbones.device.transfer import HostCopy
from common.config.stages import ColdStartConfig, SamplingConfig
from common.types import Network, StepPlan
from learner.preflight.forecast import BLOCK_ACTIVATIONS, VAE_ACTIVATIONS
from learner.training.distribution_matching import (
    DrawKey,
    MatchingSettings,
    fake_score_objective,
    renoise_samples,
    student_objective,
)

LIMITS = {
    "sd35_medium": {"kernels": 1.4, "elementwise_gb": 1.12, "modelled_ms": 1.10},
    "flux2_klein_4b": {"kernels": 1.4, "elementwise_gb": 1.20, "modelled_ms": 1.10},
}


@pytest.mark.parametrize("model", LIMITS)
def test_the_student_costs_little_more_than_the_plain_pipeline(model: str) -> None:
    counts = count(model, batch=24, layers=2)
    student, teacher = (over(counts[name], counts["plain"]) for name in ("student", "teacher"))
    assert all(1 < ratio <= LIMITS[model][name] for name, ratio in student.items()), student
    assert all(1 < ratio < 1.02 for ratio in teacher.values()), teacher


@pytest.mark.parametrize("model", LIMITS)
def test_the_host_runs_ahead_of_the_device_for_a_whole_group(model: str) -> None:
    """Nothing between a group's first kernel and its last makes the host wait; noise is copied from pinned memory."""
    group = count(model, batch=3, layers=2)["group"]
    assert (group.copies, group.waits) == (1 + STEPS, 0)


def test_the_host_runs_ahead_of_the_device_in_both_updates() -> None:
    """Latents, noise, images and the rewards' gradients are all copied within the device's queue."""
    backbone = MODELS["sd35_medium"].backbone(layers=2)
    found = count_update(backbone, StepPlan(0, backbone.sigmas(STEPS), ETA, (0, 1)), batch=2)
    assert {name: counts.waits for name, counts in found.items()} == {"fake_update": 0, "student_update": 0}
    images, latents = 2 * 3 * 512 * 512 * 4 / 1e6, 2 * 16 * 64 * 64 * 4 / 1e6
    # The images and a gradient of each of three rewards; states before and after two policy steps, and before the
    # last; two draws of noise. The rest are levels and scores.
    assert found["student_update"].copied_mb == pytest.approx(4 * images + 7 * latents, abs=1e-3)
    # Final states and three draws of noise.
    assert found["fake_update"].copied_mb == pytest.approx(4 * latents, abs=1e-3)


@pytest.mark.parametrize("model", LIMITS)
def test_the_forecast_of_memory_is_what_is_counted(model: str) -> None:
    values = kept(model, layers=2)
    # Two blocks keep less on average than all: the last one keeps nothing of the text.
    assert 0.75 * BLOCK_ACTIVATIONS < values["block"] <= BLOCK_ACTIVATIONS
    assert 0.95 * VAE_ACTIVATIONS < values["vae"] <= VAE_ACTIVATIONS


def test_images_reach_the_reward_servers_without_a_wait_of_the_learners_thread() -> None:
    images = torch.empty(2, 3, 8, 8, device=DEVICE)
    counts = counted(lambda: (images.mul(2), HostCopy(images), images.mul(2)))
    assert (counts.kernels, counts.copies, counts.waits) == (2, 1, 0)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_host_runs_ahead_of_the_device_in_the_losses_of_distribution_matching(start: float) -> None:
    backbone = MODELS["sd35_medium"].backbone(layers=2)
    add_student(backbone)
    backbone.adapters.define(Network.FAKE_SCORE, backbone.adapters.stack(Network.STUDENT))
    conditioning, empty = backbone.encode_prompts(["red"] * 3), backbone.encode_prompts([""])
    settings = MatchingSettings.of(ColdStartConfig(), SamplingConfig(), 4.5, 0.01)
    key, samples = DrawKey(0, "test", 0, range(3), 3), torch.empty(3, *backbone.latent_shape, device=DEVICE)

    def losses() -> None:
        renoised = renoise_samples(samples.clone(), start, key)
        fake_score_objective(backbone, renoised, conditioning, settings, key)
        student_objective(backbone, samples, renoised, conditioning, empty, settings, key)

    assert counted(losses).waits == 0
