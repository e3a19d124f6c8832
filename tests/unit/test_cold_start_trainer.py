"""Stage 1 by its real trainer, in a world whose answers are known on paper (`tests/gaussian_backbone.py`).

The gradients of one update are computed once more by hand (`tests/method_by_hand.py`). The student's follows from that
in its sample: the loss 0.5 mean (x - stopgrad(x - g))^2 has the gradient g / (B d) in a sample x of d numbers, and
x = ... - kappa_j (W_j x_j + b_j) + ... with kappa_j the weight of the velocity in the step.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Network
from learner.networks import COLD_START, FAKE_SCORE, Networks, StageSettings
from tests.gaussian_backbone import SIGMAS, STEPS, GaussianBackbone, student
from tests.gaussian_training import (
    GUIDANCE,
    PROMPTS,
    SEED,
    cold_start_settings,
    cold_start_trainer,
    gradients,
    new_networks,
    scatter,
)
from tests.method_by_hand import (
    Draws,
    FakeScore,
    assert_gradients,
    fake_score_loss,
    matching_direction,
    roll,
    student_gradient,
)

SETTINGS = cold_start_settings(learning_rate_student=0.02, learning_rate_fake=0.02, ema_decay=0.75)


def scattered_networks(settings=SETTINGS) -> Networks:
    networks = new_networks(settings)
    scatter(networks, (COLD_START, FAKE_SCORE))
    return networks


def stop_step(update: str, iteration: int) -> int:
    purpose = f"cold_start/{update}/step"
    return seeding.sample_indices(STEPS, 1, seed=SEED, purpose=purpose, iteration=iteration)[0]


def iteration_that_stops_at(update: str, step: int) -> int:
    return next(iteration for iteration in range(100) if stop_step(update, iteration) == step)


def strengths(iteration: int, batch: int) -> list[float]:
    return [float(PROMPTS[place].text) for place in seeding.prompt_indices(SEED, iteration, batch, len(PROMPTS))]


def draws_of(update: str, iteration: int) -> Draws:
    return Draws(SEED, f"cold_start/{update}", iteration, SETTINGS.batch_size, GaussianBackbone(4).latent_shape)


@pytest.mark.parametrize("step", range(STEPS))
def test_the_students_gradient_by_hand(step: int) -> None:
    """The fake score that judges the student is the one this iteration has already updated."""
    iteration, networks = iteration_that_stops_at("student", step), scattered_networks()
    words, draws = strengths(iteration, SETTINGS.batch_size), draws_of("student", iteration)
    states = roll([student(networks.backbone, word) for word in words], draws, step)
    cold_start_trainer(networks, SETTINGS).update(iteration)
    direction = matching_direction(
        FakeScore.of(networks.backbone), states[-1], SIGMAS[step + 1], words, draws, GUIDANCE
    ).detach()
    expected = student_gradient(direction / direction.numel(), states, step)
    assert_gradients(gradients(networks, Network.STUDENT), expected)


@pytest.mark.parametrize("step", range(STEPS))
def test_the_fake_scores_gradient_by_hand(step: int) -> None:
    iteration, networks = iteration_that_stops_at("fake", step), scattered_networks()
    words, draws = strengths(iteration, SETTINGS.batch_size), draws_of("fake", iteration)
    sample = roll([student(networks.backbone, word) for word in words], draws, step)[-1]
    fake = FakeScore.of(networks.backbone)
    fake_score_loss(fake, sample, SIGMAS[step + 1], words, draws, SETTINGS.consistency_weight).backward()
    cold_start_trainer(networks, SETTINGS).update(iteration)
    assert_gradients(gradients(networks, Network.FAKE_SCORE), fake.gradients())


class Recording(GaussianBackbone):
    """Remembers what entered every pass of the student, and at which level."""

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.passes: list[tuple[float, Tensor]] = []

    def velocity(self, network, latents_Bchw, sigma_B, conditioning, guidance_input=None):
        if network is Network.STUDENT:
            self.passes.append((float(sigma_B[0]), latents_Bchw.detach().flatten()))
        return super().velocity(network, latents_Bchw, sigma_B, conditioning, guidance_input)


def test_the_student_learns_on_other_samples_than_the_fake_score_and_both_stop_anywhere() -> None:
    backbone, stops = Recording(8), []
    trainer = cold_start_trainer(Networks(backbone, StageSettings.of(SETTINGS), SEED), SETTINGS)
    for iteration in range(24):
        backbone.passes.clear()
        trainer.update(iteration)
        first, second = (place for place, (sigma, _) in enumerate(backbone.passes) if sigma == 1)
        noises = torch.stack([backbone.passes[first][1], backbone.passes[second][1]])
        assert torch.corrcoef(noises)[0, 1].abs() < 0.15  # 768 numbers: four standard deviations
        stops.append((second - 1, len(backbone.passes) - second - 1))
    assert {fake for fake, _ in stops} == {own for _, own in stops} == set(range(STEPS))
    assert sum(fake == own for fake, own in stops) < len(stops) / 2


def test_the_average_moves_in_every_iteration_and_the_student_in_every_third() -> None:
    settings = SETTINGS.model_copy(update={"student_every": 3})
    networks = scattered_networks(settings)
    networks.average.load({key: torch.zeros_like(value) for key, value in networks.average.state().items()})
    trainer, bank = cold_start_trainer(networks, settings), networks.backbone.adapters
    average, weights = dict.fromkeys(bank.parameters(COLD_START), 0.0), bank.state(COLD_START)
    for iteration in range(7):
        trainer.update(iteration)
        before, weights = weights, bank.state(COLD_START)
        moved = any(not torch.equal(weights[key], before[key]) for key in weights)
        assert moved == (iteration in (2, 5))
        average = {key: 0.75 * average[key] + 0.25 * weights[key] for key in weights}
        for key, value in networks.average.state().items():
            torch.testing.assert_close(value, average[key])


@pytest.mark.parametrize(("network", "limits"), [("student", (1e-3, 1e9)), ("fake_score", (1e9, 1e-3))])
def test_each_network_is_clipped_by_its_own_limit(network: str, limits: tuple[float, float]) -> None:
    changes = dict(zip(("gradient_clip_student", "gradient_clip_fake"), limits, strict=True))
    networks = scattered_networks(SETTINGS.model_copy(update=changes))
    cold_start_trainer(networks, SETTINGS).update(0)
    for each in (Network.STUDENT, Network.FAKE_SCORE):
        norm = torch.cat([part.flatten() for part in gradients(networks, each).values()]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3) if each == network else norm > 2e-3
