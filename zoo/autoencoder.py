"""The shapes world's VAE: 64 px images to 4 x 16 x 16 latents, an `AutoencoderKL` a hundredth of the usual size."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from zoo.world import CANVAS, render_scenes, sample_scenes

LATENT_CHANNELS = 4
STEPS = 2000
BATCH = 16
KL_WEIGHT = 1e-5
"""Only keeps the latents bounded: their scale is set by `scaling_factor` afterwards."""


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(12, 24, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=CANVAS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_tensor(images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(seed: int, steps: int = STEPS) -> AutoencoderKL:
    """Train on renders with squared and absolute error, convolutions in bfloat16."""
    torch.manual_seed(seed)
    images = torch.from_numpy(render_scenes(sample_scenes(12_000, seed + 1), seed + 1))
    model = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    for step in range(steps):
        batch = to_tensor(images[torch.randint(len(images), (BATCH,))].numpy())
        batch = batch.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            restored = model.decode(posterior.sample()).sample.float()
        error = functional.mse_loss(restored, batch) * 4 + functional.l1_loss(restored, batch)
        loss = error + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"autoencoder {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    return _normalise(model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False), images)


@torch.no_grad()
def _normalise(model: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """Set shift and scale such that latents have mean 0 and standard deviation 1, as the flow assumes."""
    latents = torch.cat([model.encode(to_tensor(part.numpy())).latent_dist.mean for part in images[:2048].split(256)])
    model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return model


@torch.no_grad()
def encode_images(model: AutoencoderKL, images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Normalised latents float32 [B, 4, 16, 16] of uint8 images."""
    parts = [
        model.encode(to_tensor(part.numpy())).latent_dist.mean for part in torch.from_numpy(images_BHWC).split(256)
    ]
    return (torch.cat(parts) - model.config.shift_factor) * model.config.scaling_factor


def save_half(model: torch.nn.Module, directory: Path) -> None:
    """Save a diffusers or transformers model as float16 safetensors (half the size on disk; loaded as float32)."""
    model.half().save_pretrained(directory)
    model.float()
