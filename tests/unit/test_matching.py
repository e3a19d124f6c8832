"""AC-DMD against a backbone: what the settings leave out, and that a sample's draws are its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.backbones.base import Conditioning
from learner.matching import DrawKey, MatchingSettings, Renoised, fake_score_objective, renoise_samples
from tests.tiny_training import GUIDANCE, PROMPTS, SAMPLING, cold_start_settings, new_networks

SETTINGS = MatchingSettings.of(cold_start_settings(), SAMPLING, GUIDANCE)


def renoised_batch(conditioning: Conditioning, shape: tuple[int, ...], count: int) -> tuple[Renoised, DrawKey]:
    key = DrawKey(0, "test", 0, slice(0, count))
    return renoise_samples(key.normal("samples", torch.empty(count, *shape)), 0.0, key), key


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 2), (0.3, 2), (0.01, 1), (1.0, 4)])
def test_consistency_is_estimated_on_the_first_samples(tiny_pipeline: Path, fraction: float, count: int) -> None:
    backbone = new_networks(tiny_pipeline).backbone
    conditioning = backbone.encode_prompts([PROMPTS[0].text] * 4)
    renoised, key = renoised_batch(conditioning, backbone.latent_shape, 4)
    some = fake_score_objective(backbone, renoised, conditioning, replace(SETTINGS, consistency_fraction=fraction), key)

    alone = conditioning.rows(slice(0, count))
    first, first_key = renoised_batch(alone, backbone.latent_shape, count)
    whole = fake_score_objective(backbone, first, alone, SETTINGS, first_key)
    assert float(some.metrics["consistency_loss"]) == pytest.approx(float(whole.metrics["consistency_loss"]), rel=1e-4)


def test_without_its_weight_consistency_is_not_computed(tiny_pipeline: Path) -> None:
    backbone = new_networks(tiny_pipeline).backbone
    conditioning = backbone.encode_prompts([PROMPTS[0].text] * 2)
    renoised, key = renoised_batch(conditioning, backbone.latent_shape, 2)
    loss = fake_score_objective(backbone, renoised, conditioning, replace(SETTINGS, consistency_weight=0.0), key)
    assert "consistency_loss" not in loss.metrics
