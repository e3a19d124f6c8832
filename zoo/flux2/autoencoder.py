"""VAE of the shapes world in FLUX.2's form: 64 px images to 16 x 8 x 8 latents, with 2 x 2 latents per token.

Trained like the other one in `zoo/sd3/autoencoder.py`, whose convolutions initialise its outer levels. That halves the
steps. FLUX.2 standardises patches by the statistics of a batch normalisation; here they are measured once, after
training.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional

from zoo.sd3.autoencoder import latent_means, refine_decoder, train_autoencoder, training_images
from zoo.world.scenes import CANVAS

LATENT_CHANNELS = 16
PATCH = 2
"""Latent pixels per side of a token, as in FLUX.2. A latent pixel spans 8 image pixels: 16 tokens per image."""
PATCH_CHANNELS = LATENT_CHANNELS * PATCH**2
SIDE = CANVAS // 8 // PATCH
"""Patches per side of an image."""
STEPS = 2_200
REFINING_STEPS = 1_500
"""Extra steps for the decoder alone, with less noise, to restore details that the smaller map loses."""
REFINING_NOISE = 0.3
MEASURED_IMAGES = 4096
INNERMOST = ("encoder.mid_block", "decoder.mid_block")


def new_flux2_autoencoder() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(12, 24, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=CANVAS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_flux2_autoencoder(outer: AutoencoderKL, seed: int, steps: int = STEPS) -> AutoencoderKLFlux2:
    """Train from the outer levels of `outer`, measure every patch channel's mean and variance, refine the decoder."""
    model = train_autoencoder(seed, lambda: begin_with(new_flux2_autoencoder(), outer), steps)
    patches = patchify(latent_means(model, training_images(seed)[:MEASURED_IMAGES]))
    model.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    model.bn.running_var.copy_(patches.var((0, 2, 3)))
    refine_decoder(model, seed, REFINING_STEPS, REFINING_NOISE)
    return model


def begin_with(model: AutoencoderKLFlux2, outer: AutoencoderKL) -> AutoencoderKLFlux2:
    """Copy the weights that have the same place, counted from the image, and the same shape; in place."""
    own = model.state_dict()
    for name, value in outer.state_dict().items():
        if name.startswith(INNERMOST):
            continue
        place = re.sub(r"up_blocks\.(\d)", lambda match: f"up_blocks.{int(match[1]) + 1}", name)
        if place in own and own[place].shape == value.shape:
            own[place].copy_(value)
    return model


def patchify(latents_Bchw: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, 4 c, h/2, w/2]: a patch's four pixels become channels; those of one channel are adjacent."""
    return functional.pixel_unshuffle(latents_Bchw, PATCH)


@torch.no_grad()
def encode_patches(model: AutoencoderKLFlux2, images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """The transformer's data, float32 [B, 4 c, h/2, w/2]: standardised patches of uint8 images."""
    patches: Tensor = model.bn.eval()(patchify(latent_means(model, images_BHWC)))
    return patches


@torch.no_grad()
def decode_patches(model: AutoencoderKLFlux2, patches_Bchw: Tensor) -> Tensor:
    """Invert `encode_patches`: images float32 [B, 3, H, W] in [-1, 1] from standardised patches."""
    spread = (model.bn.running_var + model.config.batch_norm_eps).sqrt()
    restored = patches_Bchw * spread[:, None, None] + model.bn.running_mean[:, None, None]
    images: Tensor = model.decode(functional.pixel_shuffle(restored, PATCH)).sample
    return images
