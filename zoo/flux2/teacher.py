"""Second teacher of the shapes world: a `Flux2KleinPipeline` of 4 M parameters, trained by flow matching."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from common.flow import add_noise, flux2_mu
from zoo.flow_training import CAPTION_DROPOUT, Rates, half_precision, train_averaged, training_sigma
from zoo.flux2.autoencoder import PATCH_CHANNELS, SIDE, encode_patches
from zoo.flux2.text_encoder import PROMPT_WIDTH, encode_captions
from zoo.world.scenes import render_scenes, sample_grid_scenes
from zoo.world.tokenizers import MAX_PHRASES

WIDTH = 192
HEAD = 32
DOUBLE_BLOCKS = 2
SINGLE_BLOCKS = 3
SCENES = 40_000
STEPS = 9_000
BATCH = 64
TEACHER_STEPS = 28
SHIFT = math.exp(flux2_mu(SIDE**2, TEACHER_STEPS))
"""Shift of the schedule that half of the training's noise levels follow."""


def new_flux2_transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=PATCH_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=PROMPT_WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=(HEAD // 4,) * 4,
        rope_theta=100,
        guidance_embeds=False,
    )


def new_flux2_pipeline(
    transformer: Flux2Transformer2DModel,
    vae: AutoencoderKLFlux2,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )


def train_flux2_teacher(pipeline: Flux2KleinPipeline, seed: int, steps: int = STEPS) -> None:
    """Flow matching on rendered scenes; stores the averaged weights in the pipeline."""
    scenes = sample_grid_scenes(SCENES, seed + 10)
    patches = encode_patches(pipeline.vae, render_scenes(scenes, seed + 10)).half()
    captions = encode_captions(pipeline, [scene.caption for scene in scenes])
    empty = encode_captions(pipeline, [""])
    average = train_averaged(
        pipeline.transformer,
        lambda: flow_matching_loss(pipeline.transformer, patches, captions, empty),
        steps,
        Rates(),
    )
    pipeline.register_modules(transformer=average)


def flow_matching_loss(
    model: Flux2Transformer2DModel, patches_Nchw: Tensor, captions_NLd: Tensor, empty_1Ld: Tensor
) -> Tensor:
    """Mean squared velocity error of one random batch, the transformer in bfloat16."""
    rows = torch.randint(len(patches_Nchw), (BATCH,))
    clean = patches_Nchw[rows].float()
    dropped = torch.rand(BATCH) < CAPTION_DROPOUT
    captions = torch.where(dropped[:, None, None], empty_1Ld, captions_NLd[rows]).float()
    sigma = training_sigma(BATCH, SHIFT)
    noise = torch.randn_like(clean)
    with half_precision():
        predicted = velocity(model, add_noise(clean, noise, sigma), sigma, captions)
    return functional.mse_loss(predicted.float(), noise - clean)


def velocity(model: Flux2Transformer2DModel, patches_Bchw: Tensor, sigma_B: Tensor, captions_BLd: Tensor) -> Tensor:
    """The transformer's velocity [B, c, h, w]. Every token has its position: (time, row, column, place in the text)."""
    one = torch.arange(1)
    places = torch.cartesian_prod(one, torch.arange(SIDE), torch.arange(SIDE), one)
    text_places = torch.cartesian_prod(one, one, one, torch.arange(MAX_PHRASES))
    tokens_BLc: Tensor = model(
        hidden_states=patches_Bchw.flatten(2).mT,
        encoder_hidden_states=captions_BLd,
        timestep=sigma_B,
        img_ids=places,
        txt_ids=text_places,
        return_dict=False,
    )[0]
    velocity_Bchw: Tensor = tokens_BLc.mT.unflatten(2, (SIDE, SIDE))
    return velocity_Bchw
