"""The wiring of stage 1 on the tiny pipeline: which samples each update takes, with which draws, into which loss.

The losses themselves are checked in test_matching; learning rates of zero keep the networks still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Conditioning
from common.flow import cps_transition
from common.types import Network
from learner.training import cold_start_trainer as stage_one
from learner.training.distribution_matching import (
    DrawKey,
    MatchingSettings,
    fake_score_objective,
    renoise_samples,
    student_objective,
)
from learner.training.networks import COLD_START, FAKE_SCORE, Networks
from tests.helpers.tiny_training import (
    GUIDANCE,
    PROMPTS,
    SAMPLING,
    cold_start_settings,
    cold_start_trainer,
    new_networks,
)

SETTINGS = cold_start_settings(
    learning_rate_student=0.0,
    learning_rate_fake=0.0,
    gradient_clip_student=1e9,
    gradient_clip_fake=1e9,
    consistency_weight=5.0,
)
BATCH = SETTINGS.batch_size


def key_of(update: str, iteration: int) -> DrawKey:
    return DrawKey(0, f"cold_start/{update}", iteration, range(BATCH), BATCH)


def step_of(update: str, iteration: int) -> int:
    return seeding.sample_indices(4, 1, seed=0, purpose=f"cold_start/{update}/step", iteration=iteration)[0]


def conditioning_of(networks: Networks, iteration: int) -> Conditioning:
    chosen = seeding.prompt_indices(0, iteration, BATCH, len(PROMPTS))
    return networks.backbone.encode_prompts([PROMPTS[index].text for index in chosen])


def rolled(networks: Networks, update: str, iteration: int, *, clean: bool = False) -> Tensor:
    """The student's sample after the drawn step, or its clean prediction; its graph begins at that step."""
    backbone, key, conditioning = networks.backbone, key_of(update, iteration), conditioning_of(networks, iteration)
    sigmas = backbone.sigmas(4)
    state = key.normal("initial", torch.empty(BATCH, *backbone.latent_shape))
    for step in range(step_of(update, iteration) + 1):
        state = state.detach()
        velocity = backbone.velocity(Network.STUDENT, state, torch.full((BATCH,), sigmas[step]), conditioning)
        ends_clean = clean and step == step_of(update, iteration)
        sigma_next = 0.0 if ends_clean else sigmas[step + 1]
        transition = cps_transition(state, velocity, sigmas[step], sigma_next, SAMPLING.eta)
        state = transition.sample(key.normal(f"step{step}", state))
    return state


def test_each_update_has_samples_of_its_own_after_a_random_step(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, float]] = []

    def spy(sample: Tensor, start: float, key: DrawKey) -> object:
        seen.append((sample.detach(), start))
        return renoise_samples(sample, start, key)

    monkeypatch.setattr(stage_one, "renoise_samples", spy)
    networks = new_networks(tiny_pipeline, SETTINGS)
    trainer, sigmas = cold_start_trainer(networks, SETTINGS), networks.backbone.sigmas(4)
    starts = set()
    for iteration in range(6):
        seen.clear()
        trainer.update(iteration)
        assert len(seen) == 2
        for update, (sample, start) in zip(("fake", "student"), seen, strict=True):
            assert start == sigmas[step_of(update, iteration) + 1]
            torch.testing.assert_close(sample, rolled(networks, update, iteration).detach())
        assert not torch.equal(seen[0][0], seen[1][0])
        starts |= {start for _, start in seen}
    assert starts == set(sigmas[1:])


def assert_gradient(moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor], value: Tensor) -> None:
    """AdamW's first moment is a tenth of the loss's gradient."""
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    expected = {key: gradient for key, gradient in zip(parameters, found, strict=True) if gradient is not None}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-4
    for key, gradient in expected.items():
        torch.testing.assert_close(moments[f"{key}|exp_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-5 * float(largest))


def test_the_gradients_of_both_updates_by_hand(tiny_pipeline: Path) -> None:
    iteration = next(number for number in range(20) if step_of("student", number) in (1, 2))
    networks = new_networks(tiny_pipeline, SETTINGS)
    cold_start_trainer(networks, SETTINGS).update(iteration)

    backbone, conditioning = networks.backbone, conditioning_of(networks, iteration)
    settings, sigmas = MatchingSettings.of(SETTINGS, SAMPLING, GUIDANCE, 5.0), backbone.sigmas(4)
    settings = replace(settings, consistency_fraction=1.0)
    key, sample = key_of("fake", iteration), rolled(networks, "fake", iteration).detach()
    renoised = renoise_samples(sample, sigmas[step_of("fake", iteration) + 1], key)
    loss = fake_score_objective(backbone, renoised, conditioning, settings, key)
    assert_gradient(networks.fake_optimizer.state(), backbone.adapters.parameters(FAKE_SCORE), loss.value)

    key, sample, empty = key_of("student", iteration), rolled(networks, "student", iteration), [""]
    renoised = renoise_samples(sample, sigmas[step_of("student", iteration) + 1], key)
    loss = student_objective(backbone, sample, renoised, conditioning, backbone.encode_prompts(empty), settings, key)
    assert_gradient(networks.student_optimizer.state(), backbone.adapters.parameters(COLD_START), loss.value)


def test_plain_dmd_trains_on_clean_predictions_at_every_step(tiny_pipeline: Path) -> None:
    """x_t - sigma v at the drawn step, renoised from level 0 on: the update by hand."""
    settings = SETTINGS.model_copy(update={"objective": "clean", "consistency_weight": 0.0})
    iteration = next(number for number in range(20) if step_of("student", number) in (1, 2))
    networks = new_networks(tiny_pipeline, settings)
    cold_start_trainer(networks, settings).update(iteration)

    backbone, conditioning = networks.backbone, conditioning_of(networks, iteration)
    matching = MatchingSettings.of(settings, SAMPLING, GUIDANCE, 0.0)
    key, sample = key_of("fake", iteration), rolled(networks, "fake", iteration, clean=True).detach()
    loss = fake_score_objective(backbone, renoise_samples(sample, 0.0, key), conditioning, matching, key)
    assert_gradient(networks.fake_optimizer.state(), backbone.adapters.parameters(FAKE_SCORE), loss.value)

    key, sample = key_of("student", iteration), rolled(networks, "student", iteration, clean=True)
    renoised, empty = renoise_samples(sample, 0.0, key), backbone.encode_prompts([""])
    loss = student_objective(backbone, sample, renoised, conditioning, empty, matching, key)
    assert_gradient(networks.student_optimizer.state(), backbone.adapters.parameters(COLD_START), loss.value)
