"""Teacher of the shapes world: a `StableDiffusion3Pipeline` of 4.5 M parameters, trained by flow matching."""

from __future__ import annotations

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
HEAD = 32
SCENES = 40_000
STEPS = 8_500
BATCH = 64


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=CANVAS // 4,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=CANVAS // 4 // PATCH,
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
def encode_captions(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token features [B, MAX_TOKENS + MAX_PHRASES, d] and pooled ones [B, d]; float16, so that a set fits in memory."""
    tokens, pooled = [], []
    for start in range(0, len(captions), 256):
        part = captions[start : start + 256]
        encoded = pipeline.encode_prompt(
            part, part, part, do_classifier_free_guidance=False, max_sequence_length=MAX_PHRASES
        )
        tokens.append(encoded[0].half())
        pooled.append(encoded[2].half())
    return torch.cat(tokens), torch.cat(pooled)


def train_teacher(vae: AutoencoderKL, text: TextEncoders, seed: int, steps: int = STEPS) -> StableDiffusion3Pipeline:
    """Flow matching on rendered scenes; return the pipeline with the averaged weights."""
    torch.manual_seed(seed)
    pipeline = new_pipeline(new_transformer(), vae, text)
    scenes = sample_grid_scenes(SCENES, seed + 10)
    latents = encode_images(vae, render_scenes(scenes, seed + 10)).half()
    captions = encode_captions(pipeline, [scene.caption for scene in scenes])
    empty = encode_captions(pipeline, [""])
    average = train_averaged(
        pipeline.transformer,
        lambda: flow_matching_loss(pipeline.transformer, latents, captions, empty),
        steps,
        Rates(),
    )
    pipeline.register_modules(transformer=average)
    return pipeline


def flow_matching_loss(
    model: SD3Transformer2DModel,
    latents_Nchw: Tensor,
    captions: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
) -> Tensor:
    """Mean squared velocity error of one random batch, the transformer in bfloat16."""
    rows = torch.randint(len(latents_Nchw), (BATCH,))
    clean = latents_Nchw[rows].float()
    dropped = torch.rand(BATCH) < CAPTION_DROPOUT
    tokens = torch.where(dropped[:, None, None], empty[0], captions[0][rows]).float()
    pooled = torch.where(dropped[:, None], empty[1], captions[1][rows]).float()
    sigma = training_sigma(BATCH, SHIFT)
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
