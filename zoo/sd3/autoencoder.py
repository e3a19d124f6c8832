"""VAE of the shapes world: 64 px images to 4 x 16 x 16 latents, an `AutoencoderKL` a hundredth of the usual size.

The training recipe is shared by all families and worlds; `zoo/flux2/autoencoder.py` has the other model.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional

from zoo.world.scenes import CANVAS, render_scenes, sample_grid_scenes, sample_scenes

LATENT_CHANNELS = 4
STEPS = 4500
BATCH = 16
IMAGES = 12_000
LATENT_NOISE = 0.5
"""Standard deviation of the posterior, relative to latent channels of standard deviation 1.

It replaces a KL term, which left two of four channels unused. The noise spreads the code over all channels, so far
apart that slightly wrong latents of a generator still decode to a clean image.
"""

Model = TypeVar("Model", AutoencoderKL, AutoencoderKLFlux2)


def new_autoencoder(latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(12, 24, 32),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=CANVAS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def to_tensor(images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def training_images(seed: int) -> npt.NDArray[np.uint8]:
    """Scenes of the generator's world and of the scorers' wider one, half each, in random order."""
    scenes = [*sample_scenes(IMAGES // 2, seed + 1), *sample_grid_scenes(IMAGES // 2, seed + 2)]
    random.Random(seed).shuffle(scenes)
    return render_scenes(scenes, seed + 1)


def train_autoencoder(
    seed: int,
    new_model: Callable[[], Model],
    steps: int = STEPS,
    images_of: Callable[[int], npt.NDArray[np.uint8]] = training_images,
    noise: float = LATENT_NOISE,
) -> Model:
    """Train with squared and absolute error, convolutions in bfloat16; `images_of` draws the renders from the seed.

    Afterwards the encoder's means have mean 0 and deviation 1 in every channel; its posterior has the training noise.
    """
    torch.manual_seed(seed)
    images = torch.from_numpy(images_of(seed))
    model = new_model()
    _fit(model, images, lambda batch: _standardise(latent_mean(model, batch)), steps, 3e-3, noise)
    return _fold_standardisation(model.eval().requires_grad_(False), images, noise)


def refine_decoder(model: Model, seed: int, steps: int, noise: float) -> None:
    """Train only the decoder, in place, on fixed latents with noise of this standard deviation."""
    torch.manual_seed(seed)
    model.decoder.train().requires_grad_(True)
    _fit(model, torch.from_numpy(training_images(seed)), lambda batch: latent_mean(model, batch), steps, 1e-3, noise)
    model.eval().requires_grad_(False)


def latent_mean(model: Model, images_BCHW: Tensor) -> Tensor:
    """Means of the posterior, float32 [B, c, h, w], of images in [-1, 1]."""
    mean: Tensor = model.encode(images_BCHW).latent_dist.mean
    return mean.float()


def _fit(
    model: Model, images: Tensor, latents_of: Callable[[Tensor], Tensor], steps: int, rate: float, noise: float
) -> None:
    """Restore images from their noisy latents; the learning rate rises to `rate` and falls to zero."""
    model.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    for step in range(steps):
        batch = to_tensor(images[torch.randint(len(images), (BATCH,))].numpy())
        batch = batch.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = latents_of(batch)
            restored = model.decode(latents + noise * torch.randn_like(latents)).sample.float()
        loss = functional.mse_loss(restored, batch) * 4 + functional.l1_loss(restored, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"autoencoder {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format)


def _standardise(latents_Bchw: Tensor) -> Tensor:
    """Scale every channel to mean 0 and standard deviation 1 over the batch."""
    mean = latents_Bchw.mean((0, 2, 3), keepdim=True)
    return (latents_Bchw - mean) / (latents_Bchw.std((0, 2, 3), keepdim=True) + 1e-4)


@torch.no_grad()
def _fold_standardisation(model: Model, images: Tensor, noise: float) -> Model:
    """Make the encoder's last convolution standardise over the world instead of over a batch; in place."""
    latents = latent_means(model, images[:2048].numpy())
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last, channels = model.encoder.conv_out, latents.shape[1]
    last.weight[:channels] /= spread[:, None, None, None]
    last.bias[:channels] = (last.bias[:channels] - mean) / spread
    last.weight[channels:] = 0
    last.bias[channels:] = 2 * math.log(noise)
    return model


@torch.no_grad()
def latent_means(model: Model, images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Means of the posterior, float32 [B, c, h, w], of uint8 images."""
    parts = torch.from_numpy(images_BHWC).split(256)
    return torch.cat([latent_mean(model, to_tensor(part.numpy())) for part in parts])


def encode_images(model: AutoencoderKL, images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Normalised latents float32 [B, c, 16, 16] of uint8 images."""
    latents_Bchw: Tensor = (latent_means(model, images_BHWC) - model.config.shift_factor) * model.config.scaling_factor
    return latents_Bchw
