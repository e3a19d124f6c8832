"""AC-DMD against a backbone: its losses by hand, what the settings leave out, and that a sample's draws are its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.backbones.base import Backbone, Conditioning
from common.types import Guidance, Network
from learner.training.distribution_matching import (
    DrawKey,
    MatchingSettings,
    Renoised,
    fake_score_objective,
    renoise_samples,
    student_objective,
)
from tests.helpers.tiny_training import GUIDANCE, PROMPTS, SAMPLING, cold_start_settings, new_networks

SETTINGS = MatchingSettings.of(cold_start_settings(), SAMPLING, GUIDANCE, 0.01)


def renoised_batch(conditioning: Conditioning, shape: tuple[int, ...], count: int) -> tuple[Renoised, DrawKey]:
    key = DrawKey(0, "test", 0, range(count), count)
    return renoise_samples(key.normal("samples", torch.empty(count, *shape)), 0.0, key), key


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, [0, 2]), (0.3, [0, 3]), (0.01, [0]), (1.0, [0, 1, 2, 3])])
def test_consistency_is_estimated_on_rows_spread_evenly(tiny_pipeline: Path, fraction: float, rows: list[int]) -> None:
    backbone = new_networks(tiny_pipeline).backbone
    conditioning = backbone.encode_prompts([PROMPTS[0].text] * 4)
    renoised, key = renoised_batch(conditioning, backbone.latent_shape, 4)
    some = consistency(backbone, renoised, conditioning, fraction, key)

    index = torch.tensor(rows)
    alone = renoised_rows(renoised, index)
    # As a part of the batch in which every row is regularised, it weighs as much as it has rows: the whole mean.
    whole = consistency(backbone, alone, conditioning.rows(index), 1.0, replace(key, rows=rows))
    assert some == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_parts_of_a_batch_add_up_to_its_consistency(tiny_pipeline: Path, fraction: float) -> None:
    backbone = new_networks(tiny_pipeline).backbone
    conditioning = backbone.encode_prompts([PROMPTS[0].text] * 5)
    renoised, key = renoised_batch(conditioning, backbone.latent_shape, 5)
    whole = consistency(backbone, renoised, conditioning, fraction, key)
    parts = 0.0
    for rows in (range(2), range(2, 3), range(3, 5)):
        index = torch.tensor(list(rows))
        part = consistency(
            backbone, renoised_rows(renoised, index), conditioning.rows(index), fraction, replace(key, rows=rows)
        )
        parts += part * len(rows) / 5
    assert parts == pytest.approx(whole, rel=1e-4)


def consistency(
    backbone: Backbone, renoised: Renoised, conditioning: Conditioning, fraction: float, key: DrawKey
) -> float:
    """As it is reported, which is as it counts."""
    settings = replace(SETTINGS, consistency_fraction=fraction, consistency_weight=1e3)
    loss = fake_score_objective(backbone, renoised, conditioning, settings, key)
    reported = float(loss.metrics["consistency_loss"])
    assert float(loss.value.detach() - loss.metrics["fake_score_loss"]) == pytest.approx(1e3 * reported, rel=1e-3)
    return reported


def renoised_rows(renoised: Renoised, index: torch.Tensor) -> Renoised:
    return replace(
        renoised,
        x_start_Bchw=renoised.x_start_Bchw[index],
        noise_Bchw=renoised.noise_Bchw[index],
        latents_Bchw=renoised.latents_Bchw[index],
        sigma_B=renoised.sigma_B[index],
    )


def test_without_its_weight_consistency_is_not_computed(tiny_pipeline: Path) -> None:
    backbone = new_networks(tiny_pipeline).backbone
    conditioning = backbone.encode_prompts([PROMPTS[0].text] * 2)
    renoised, key = renoised_batch(conditioning, backbone.latent_shape, 2)
    loss = fake_score_objective(backbone, renoised, conditioning, replace(SETTINGS, consistency_weight=0.0), key)
    assert "consistency_loss" not in loss.metrics


def test_the_two_samples_of_the_consistency_go_through_the_model_together(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes per update of the fake score: the noisy samples, then both steps back from each regularised one."""
    backbone = new_networks(tiny_pipeline).backbone
    conditioning = backbone.encode_prompts([PROMPTS[0].text] * 4)
    renoised, key = renoised_batch(conditioning, backbone.latent_shape, 4)
    rows, velocity = [], backbone.velocity

    def counted(network: Network, latents_Bchw: Tensor, *rest: object) -> Tensor:
        rows.append(len(latents_Bchw))
        return velocity(network, latents_Bchw, *rest)

    monkeypatch.setattr(backbone, "velocity", counted)
    fake_score_objective(backbone, renoised, conditioning, replace(SETTINGS, consistency_fraction=0.75), key)
    assert rows == [4, 2 * 3]


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────

START, ETA = 0.5, 0.9
KEY = DrawKey(0, "test", 3, range(2, 8), 10)
PROMPT, EMPTY = 0.7, -0.2


class Lines:
    """Velocities by hand: slope x + the prompt's number; the slopes of teacher, fake score and student differ."""

    guidance = Guidance.CLASSIFIER_FREE

    def __init__(self) -> None:
        self.slopes = {Network.TEACHER: torch.tensor(0.5), Network.STUDENT: torch.tensor(2.0)}
        self.slopes[Network.FAKE_SCORE] = torch.tensor(-1.5, requires_grad=True)

    def velocity(self, network: Network, latents_Bchw: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        return self.slopes[network] * latents_Bchw + conditioning.tensors["number_B"].view(-1, 1, 1, 1)


def numbers(value: float, count: int) -> Conditioning:
    return Conditioning({"number_B": torch.full((count,), value)})


def noisy_samples() -> Tensor:
    return KEY.normal("samples", torch.empty(len(KEY.rows), 2, 1, 3))


def stepped(x: Tensor, v: Tensor, t: Tensor, s: Tensor | float, z: Tensor) -> Tensor:
    """One CPS transition from t to s, written out."""
    angle = ETA * math.pi / 2
    return (1 - s) * (x - t * v) + s * math.cos(angle) * (x + (1 - t) * v) + s * math.sin(angle) * z


@pytest.mark.parametrize("other", [{"seed": 1}, {"purpose": "other"}, {"iteration": 4}, {"rows": range(3, 9)}])
def test_a_draw_is_a_function_of_every_part_of_its_key(other: dict[str, object]) -> None:
    like, key = torch.empty(len(KEY.rows), 2, 1, 3), replace(KEY, **other)
    for found, again in (
        (KEY.normal("x", like), key.normal("x", like)),
        (KEY.uniform("x"), key.uniform("x")),
    ):
        assert (found != again).all()
    assert (KEY.normal("x", like) != KEY.normal("y", like)).all()
    assert torch.equal(replace(KEY, batch=20).normal("x", like), KEY.normal("x", like))


def test_samples_are_renoised_from_their_own_level_with_draws_of_their_own() -> None:
    x = noisy_samples()
    renoised = renoise_samples(x, START, KEY)
    t, z = renoised.sigma_B.view(-1, 1, 1, 1), renoised.noise_Bchw
    assert (renoised.sigma_B > START).all()
    assert len(set(renoised.sigma_B.tolist())) == len(KEY.rows)
    assert len(set(z[:, 0, 0, 0].tolist())) == len(KEY.rows)
    assert torch.equal(renoise_samples(x[2:3], START, KEY.at([2])).noise_Bchw, z[2:3])
    keep = (1 - t) / (1 - START)
    torch.testing.assert_close(renoised.latents_Bchw, keep * x + (t**2 - keep**2 * START**2).sqrt() * z)


def test_the_students_gradient_by_hand() -> None:
    """(x^fake - x^teacher) / mean |x - x^teacher|, the teacher guided, the fake score not, one noise for both."""
    renoised, guidance = renoise_samples(noisy_samples(), START, KEY), 3.0
    sample = renoised.x_start_Bchw.clone().requires_grad_()
    settings = replace(SETTINGS, guidance=guidance, eta=ETA)
    conditioning, empty = numbers(PROMPT, len(sample)), numbers(EMPTY, 1)
    loss = student_objective(Lines(), sample, renoised, conditioning, empty, settings, KEY)
    loss.value.backward()

    x, t, z = renoised.latents_Bchw, renoised.sigma_B.view(-1, 1, 1, 1), KEY.normal("project", sample)
    teacher = stepped(x, 0.5 * x + EMPTY + guidance * (PROMPT - EMPTY), t, START, z)
    fake = stepped(x, -1.5 * x + PROMPT, t, START, z)
    distance = (renoised.x_start_Bchw - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(sample.grad, (fake - teacher) / distance / sample.numel())


def test_the_fake_scores_loss_and_gradient_by_hand() -> None:
    """The denoising loss plus the weighted consistency: two draws, no gradient through the transitions."""
    renoised, weight, backbone = renoise_samples(noisy_samples(), START, KEY), 2.0, Lines()
    settings = replace(SETTINGS, eta=ETA, consistency_weight=weight, consistency_fraction=1.0, fake_max_weight=10.0)
    loss = fake_score_objective(backbone, renoised, numbers(PROMPT, len(KEY.rows)), settings, KEY)
    slope = backbone.slopes[Network.FAKE_SCORE]
    (found,) = torch.autograd.grad(loss.value, slope)

    x_s, x, z = renoised.x_start_Bchw, renoised.latents_Bchw, renoised.noise_Bchw
    t = renoised.sigma_B.view(-1, 1, 1, 1)
    w = (t**2 - ((1 - t) / (1 - START) * START) ** 2).sqrt()
    target = -x_s / (1 - START) + z * (t + (1 - t) * START**2 / (1 - START) ** 2) / w
    denoising = (w.pow(-2).clamp(max=10.0) * (w * (slope * x + PROMPT) - w * target) ** 2).mean()
    steps = (KEY.uniform("earlier").view(-1, 1, 1, 1) * 200).floor() + 1
    earlier = (t - steps / 1000).clamp(min=0)
    deviations = []
    for name in ("first", "second"):
        sample = stepped(x, (slope * x + PROMPT).detach(), t, earlier, KEY.normal(name, x))
        deviations.append(sample - earlier * (slope * sample + PROMPT) - (x - t * (slope * x + PROMPT)))
    expected = denoising + weight * (deviations[0] * deviations[1]).mean()
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, slope)[0])
