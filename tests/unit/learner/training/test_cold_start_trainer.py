"""Stage 1 by its real trainer, in a world whose answers are known on paper (`tests/helpers/gaussian_backbone.py`).

The gradients of one update are computed once more by hand (`tests/helpers/method_by_hand.py`). The student's follows
from that in its sample: the loss 0.5 mean (x - stopgrad(x - g))^2 has the gradient g / (B d) in a sample x of d
numbers, and x = ... - kappa_j (W_j x_j + b_j) + ... with kappa_j the weight of the velocity in the step.

A student whose every state is distributed as the guided teacher's is at rest, and affine steps can be exact: training
must reach that mean and covariance from a wrong start. The normaliser changes the gradient's size, not where it is 0.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common import seeding
from common.types import Network
from learner.training.networks import COLD_START, FAKE_SCORE, Networks, StageSettings
from tests.helpers.gaussian_backbone import ETA, SIGMAS, STEPS, GaussianBackbone, prompted, student, student_deltas
from tests.helpers.gaussian_training import (
    GUIDANCE,
    ONE_PROMPT,
    PROMPTS,
    SEED,
    cold_start_settings,
    cold_start_trainer,
    gradients,
    new_networks,
    scatter,
    scattered,
)
from tests.helpers.gaussian_world import exact_steps
from tests.helpers.method_by_hand import (
    Draws,
    FakeScore,
    assert_gradients,
    fake_score_loss,
    matching_direction,
    roll,
    student_gradient,
)

AT_REST = prompted(GUIDANCE)
"""The guided teacher's pixels for a prompt of strength 1."""
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


@pytest.mark.parametrize(("network", "limits"), [("student", (1e-4, 1e9)), ("fake_score", (1e9, 1e-4))])
def test_each_network_is_clipped_by_its_own_limit(network: str, limits: tuple[float, float]) -> None:
    changes = dict(zip(("gradient_clip_student", "gradient_clip_fake"), limits, strict=True))
    networks = scattered_networks(SETTINGS.model_copy(update=changes))
    cold_start_trainer(networks, SETTINGS).update(0)
    for each in (Network.STUDENT, Network.FAKE_SCORE):
        norm = torch.cat([part.flatten() for part in gradients(networks, each).values()]).norm().item()
        assert norm == pytest.approx(1e-4, rel=1e-2) if each == network else norm > 2e-4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def wrong_start() -> dict[str, Tensor]:
    """The exact student of the teacher without guidance, with every weight moved at random."""
    exact = student_deltas(exact_steps(prompted(1.0), SIGMAS, ETA), 1.0)
    moves = scattered(exact, 0.15, seed=1)
    return {key: exact[key] + moves[key] for key in exact}


def test_cold_start_recovers_the_guided_teachers_mean_and_covariance() -> None:
    """Moments of the averaged student's samples: exact, because they are an affine map of normal noise."""
    rates = {"learning_rate_student": 0.02, "learning_rate_fake": 0.03, "learning_rate_schedule": "linear"}
    settings = cold_start_settings(
        iterations=400,
        batch_size=16,
        gradient_clip_fake=1.0,
        consistency_weight=0.01,
        consistency_fraction=0.25,
        ema_decay=0.98,
        **rates,
    )
    networks = new_networks(settings, side=16)
    networks.backbone.adapters.load(COLD_START, wrong_start())
    networks.average.load(wrong_start())
    before = student(networks.backbone, 1.0).state(STEPS)
    assert relative_error(before.mean_c, AT_REST.mean_c) > 0.7
    assert relative_error(before.covariance_cc, AT_REST.covariance_cc) > 0.2
    trainer = cold_start_trainer(networks, settings, ONE_PROMPT)
    for iteration in range(settings.iterations):
        trainer.update(iteration)
    with networks.averaged_student():
        after = student(networks.backbone, 1.0).state(STEPS)
    assert relative_error(after.mean_c, AT_REST.mean_c) < 0.05
    assert relative_error(after.covariance_cc, AT_REST.covariance_cc) < 0.05
