"""Builds the diffusion pipeline of the shapes world (VAE, text encoders, teacher) and measures the teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from zoo.measuring import GUIDANCE, Exam, generate, to_pixels
from zoo.sd3.autoencoder import encode_images, new_autoencoder, train_autoencoder
from zoo.sd3.teacher import train_teacher
from zoo.sd3.text_encoders import TextEncoders, train_text_encoders

EARLY_STEPS = 3_000
"""Training steps of the early teacher."""


def build_pipeline(out_dir: Path, seed: int = 0) -> dict[str, float]:
    """Train the three parts, save them as a diffusers directory, and return the figures of the saved pipeline.

    The checker in `../checker` measures gold; in a full build it is ready long before the pipeline.
    """
    autoencoder = train_autoencoder(seed, new_autoencoder)
    text, facts_right = train_text_encoders(seed)
    pipeline = train_teacher(autoencoder, text, seed)
    save_pipeline(pipeline, out_dir)
    return {"facts_read_right": facts_right, **measure_pipeline(out_dir)}


def build_early_pipeline(out_dir: Path, seed: int = 0) -> dict[str, float]:
    """A teacher with room above it: its training is a third as long. VAE and text encoders are those of `../pipeline`.

    Returns the figures of the saved pipeline.
    """
    pipeline = StableDiffusion3Pipeline.from_pretrained(out_dir.parent / "pipeline", torch_dtype=torch.float32)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    for module in (pipeline.vae, *encoders):
        module.eval().requires_grad_(False)
    text = TextEncoders(pipeline.tokenizer, pipeline.tokenizer_3, *encoders)
    save_pipeline(train_teacher(pipeline.vae, text, seed, EARLY_STEPS), out_dir)
    return measure_pipeline(out_dir)


def save_pipeline(pipeline: DiffusionPipeline, out_dir: Path) -> None:
    """Save as float16 safetensors: half the size; loading as float32 gives the rounded weights."""
    pipeline.to(dtype=torch.float16).save_pretrained(out_dir)


def measure_pipeline(directory: Path) -> dict[str, float]:
    """Gold of the saved pipeline with 28 guided and 4 unguided Euler steps, and the loss of the VAE alone."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    exam = Exam.beside(directory)
    with torch.no_grad():
        latents = encode_images(pipeline.vae, exam.renders) / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(latents + pipeline.vae.config.shift_factor).sample
    return {
        "gold_renders": exam.gold(exam.renders),
        "gold_reconstructions": exam.gold(to_pixels(decoded)),
        "gold_28_guided": exam.gold(generate(pipeline, exam.captions, 28, GUIDANCE)),
        "gold_4_unguided": exam.gold(generate(pipeline, exam.captions, 4, 1.0)),
    }
