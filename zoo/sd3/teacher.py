"""Teacher of the shapes world: a `StableDiffusion3Pipeline` of 4.5 M parameters, trained by flow matching.

`zoo/text/pipeline.py` trains the text world's with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional

from common.flow import add_noise
from zoo.flow_training import CAPTION_DROPOUT, Rates, half_precision, train_averaged, training_sigma
from zoo.sd3.autoencoder import LATENT_CHANNELS, encode_images
from zoo.sd3.text_encoders import CLIP_WIDTH, T5_WIDTH, TextEncoders
from zoo.world.scenes import CANVAS, render_scenes, sample_grid_scenes
from zoo.world.tokenizers import MAX_PHRASES

SHIFT = 3.0
PATCH = 4
"""Latent pixels per side of a token: 16 tokens per image; a smaller patch would cost four times as much."""
WIDTH = 160
LAYERS = 5
HEAD = 32
SCENES = 40_000
STEPS = 8_500
BATCH = 64


@dataclass(frozen=True)
class Lessons:
    """Pictures with their captions, uint8 [N, H, W, 3], and the tokens that T5 gets of a caption."""

    images_NHWC: npt.NDArray[np.uint8]
    captions: Sequence[str]
    text_length: int


def new_transformer(
    channels: int = LATENT_CHANNELS, patch: int = PATCH, width: int = WIDTH, layers: int = LAYERS
) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=CANVAS // 4,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=CANVAS // 4 // patch,
        qk_norm="rms_norm",
    )


def new_pipeline(
    transformer: SD3Transformer2DModel, vae: AutoencoderKL, text: TextEncoders
) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.clip_1,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.clip_2,
        tokenizer_2=text.clip_tokenizer,
        text_encoder_3=text.t5,
        tokenizer_3=text.t5_tokenizer,
    )


@torch.no_grad()
def encode_captions(
    pipeline: StableDiffusion3Pipeline, captions: Sequence[str], text_length: int
) -> tuple[Tensor, Tensor]:
    """Token features [B, CLIP's + T5's tokens, d] and pooled ones [B, d]; float16, so that a set fits in memory."""
    tokens, pooled = [], []
    for start in range(0, len(captions), 256):
        part = list(captions[start : start + 256])
        encoded = pipeline.encode_prompt(
            part, part, part, do_classifier_free_guidance=False, max_sequence_length=text_length
        )
        tokens.append(encoded[0].half())
        pooled.append(encoded[2].half())
    return torch.cat(tokens), torch.cat(pooled)


def train_teacher(vae: AutoencoderKL, text: TextEncoders, seed: int, steps: int = STEPS) -> StableDiffusion3Pipeline:
    """Flow matching on rendered scenes; return the pipeline with the averaged weights."""
    torch.manual_seed(seed)
    pipeline = new_pipeline(new_transformer(), vae, text)
    scenes = sample_grid_scenes(SCENES, seed + 10)
    captions = [scene.caption for scene in scenes]
    train_transformer(pipeline, Lessons(render_scenes(scenes, seed + 10), captions, MAX_PHRASES), steps)
    return pipeline


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    lessons: Lessons,
    steps: int,
    batch: int = BATCH,
    keep: Callable[[int, SD3Transformer2DModel], None] | None = None,
) -> None:
    """Flow matching on pictures, from the weights that the pipeline has; leaves the averaged weights in it.

    `keep` is `train_averaged`'s.
    """
    pipeline.transformer.requires_grad_(True)
    latents = encode_images(pipeline.vae, lessons.images_NHWC).half()
    captions = encode_captions(pipeline, lessons.captions, lessons.text_length)
    empty = encode_captions(pipeline, [""], lessons.text_length)
    average = train_averaged(
        pipeline.transformer,
        lambda: flow_matching_loss(pipeline.transformer, latents, captions, empty, batch),
        steps,
        Rates(),
        keep,
    )
    pipeline.register_modules(transformer=average)


def flow_matching_loss(
    model: SD3Transformer2DModel,
    latents_Nchw: Tensor,
    captions: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    batch: int,
) -> Tensor:
    """Mean squared velocity error of one random batch, the transformer in bfloat16."""
    rows = torch.randint(len(latents_Nchw), (batch,))
    clean = latents_Nchw[rows].float()
    dropped = torch.rand(batch) < CAPTION_DROPOUT
    tokens = torch.where(dropped[:, None, None], empty[0], captions[0][rows]).float()
    pooled = torch.where(dropped[:, None], empty[1], captions[1][rows]).float()
    sigma = training_sigma(batch, SHIFT)
    noise = torch.randn_like(clean)
    with half_precision():
        velocity = model(
            hidden_states=add_noise(clean, noise, sigma),
            timestep=sigma * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return functional.mse_loss(velocity.float(), noise - clean)
