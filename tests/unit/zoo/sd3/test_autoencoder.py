"""The shipped VAE: its latents are what the flow assumes, and forgive what a generator gets slightly wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from zoo.checker.parsing import GoldChecker
from zoo.sd3.autoencoder import LATENT_NOISE, encode_images, to_tensor
from zoo.world.scenes import render_scenes, sample_grid_scenes

WEIGHTS = Path(__file__).parents[4] / "zoo" / "weights"
SCENES = sample_grid_scenes(64, seed=77)
RENDERS = render_scenes(SCENES, seed=77)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(WEIGHTS / "pipeline" / "vae", torch_dtype=torch.float32).eval()


def gold(autoencoder: AutoencoderKL, latents_Bchw: Tensor) -> float:
    with torch.no_grad():
        decoded = autoencoder.decode(latents_Bchw / autoencoder.config.scaling_factor).sample
    images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    verdicts = GoldChecker.load(WEIGHTS / "checker").verdict(images, [scene.caption for scene in SCENES])
    return float(np.mean(verdicts))


def test_every_latent_channel_has_mean_0_and_deviation_1(autoencoder: AutoencoderKL) -> None:
    latents = encode_images(autoencoder, RENDERS)
    assert latents.mean((0, 2, 3)).abs().max() < 0.15
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_the_posterior_has_the_spread_of_the_training_noise(autoencoder: AutoencoderKL) -> None:
    with torch.no_grad():
        posterior = autoencoder.encode(to_tensor(RENDERS[:4])).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, LATENT_NOISE), rtol=1e-3, atol=0)


def test_reconstructions_obey_their_captions_even_from_noisy_latents(autoencoder: AutoencoderKL) -> None:
    latents = encode_images(autoencoder, RENDERS)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert gold(autoencoder, latents) >= 0.98
    assert gold(autoencoder, latents + 0.3 * noise) >= 0.95
