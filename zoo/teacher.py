"""The shapes world's teacher: a `StableDiffusion3Pipeline` of 4.5 M parameters, trained by flow matching."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.flow import add_noise
from zoo.autoencoder import LATENT_CHANNELS, encode_images
from zoo.text_encoders import CLIP_WIDTH, T5_WIDTH, TextEncoders
from zoo.tokenizers import MAX_PHRASES
from zoo.world import CANVAS, render_scenes, sample_grid_scenes

SHIFT = 3.0
PATCH = 4
"""Latent pixels a token spans: 16 tokens an image, where a smaller patch would cost four times as much."""
WIDTH = 160
HEAD = 32
SCENES = 40_000
STEPS = 8_500
BATCH = 64
MATRIX_LEARNING_RATE = 1e-2
"""Muon's, for the matrices of the transformer blocks: it needs about a third fewer steps than AdamW."""
LEARNING_RATE = 2e-3
"""AdamW's, for everything else."""
WARMUP_STEPS = 100
CONSTANT_FRACTION = 0.3
"""Part of the training at the full learning rate, which then falls linearly to zero."""
CAPTION_DROPOUT = 0.1
"""Fraction of samples trained without a caption, for classifier-free guidance."""
EMA_DECAY = 0.998


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
    """Flow matching on rendered scenes; returns the pipeline with the averaged weights."""
    torch.manual_seed(seed)
    pipeline = new_pipeline(new_transformer(), vae, text)
    scenes = sample_grid_scenes(SCENES, seed + 10)
    latents = encode_images(vae, render_scenes(scenes, seed + 10)).half()
    captions = encode_captions(pipeline, [scene.caption for scene in scenes])
    empty = encode_captions(pipeline, [""])
    average = _train(pipeline.transformer, latents, captions, empty, steps)
    pipeline.register_modules(transformer=average.eval().requires_grad_(False))
    return pipeline


def _train(
    model: SD3Transformer2DModel,
    latents_Nchw: Tensor,
    captions: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    steps: int,
) -> SD3Transformer2DModel:
    """Returns a copy of the model with the moving average of its weights."""
    average = copy.deepcopy(model)
    optimizers = _new_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_factor(steps)) for optimizer in optimizers]
    started, running = time.monotonic(), None
    for step in range(steps):
        loss = flow_matching_loss(model, latents_Nchw, captions, empty)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        # Follows closely at first, so that the untrained weights are soon forgotten.
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 250 == 0:
            print(f"teacher {step} loss {running:.4f} {time.monotonic() - started:.0f} s", flush=True)
    return average


def _new_optimizers(model: SD3Transformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward layers, AdamW for all else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, MATRIX_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


def _rate_factor(steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < steps * CONSTANT_FRACTION:
            return min(1.0, (step + 1) / WARMUP_STEPS)
        return (steps - step) / (steps * (1 - CONSTANT_FRACTION))

    return factor


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
    sigma = _training_sigma(BATCH)
    noise = torch.randn_like(clean)
    # The fused attention's backward pass in bfloat16 takes six times as long as the plain one on a CPU, half of a step.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model(
            hidden_states=add_noise(clean, noise, sigma),
            timestep=sigma * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return functional.mse_loss(velocity.float(), noise - clean)


def _training_sigma(count: int) -> Tensor:
    """Half the noise levels logit-normal (as SD3), half uniform in the shifted schedule that sampling walks along."""
    uniform = torch.rand(count - count // 2)
    shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    return torch.cat([torch.sigmoid(torch.randn(count // 2)), shifted])
