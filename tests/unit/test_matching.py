"""AC-DMD against a backbone: what the settings leave out, and that a sample's draws are its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.backbones.base import Backbone, Conditioning
from learner.training.distribution_matching import (
    DrawKey,
    MatchingSettings,
    Renoised,
    fake_score_objective,
    renoise_samples,
)
from tests.tiny_training import GUIDANCE, PROMPTS, SAMPLING, cold_start_settings, new_networks

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
    settings = replace(SETTINGS, consistency_fraction=fraction)
    return float(fake_score_objective(backbone, renoised, conditioning, settings, key).metrics["consistency_loss"])


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
