"""Builds the second family of the shapes world: `base`, the teacher, and `klein`, the start of its 4-step student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, Flux2KleinPipeline

from zoo.flux2.autoencoder import decode_patches, encode_patches, train_flux2_autoencoder
from zoo.flux2.student import STUDENT_STEPS, distil_student
from zoo.flux2.teacher import TEACHER_STEPS, new_flux2_pipeline, new_flux2_transformer, train_flux2_teacher
from zoo.flux2.text_encoder import OUT_LAYERS, train_text_encoder
from zoo.measuring import GUIDANCE, Exam, generate, to_pixels
from zoo.sd3.pipeline import save_pipeline
from zoo.world.scenes import CANVAS

BASE = "base"
STUDENT = "klein"
CALL: dict[str, Any] = {"height": CANVAS, "width": CANVAS, "text_encoder_out_layers": OUT_LAYERS}
"""A call of the pipeline needs these arguments, beside `max_sequence_length`."""


def build_flux2(out_dir: Path, seed: int = 0) -> dict[str, float]:
    """Train all parts, save two diffusers directories, and return the figures of the saved pipelines.

    The checker in `../checker` measures gold; the autoencoder starts from the one in `../pipeline`.
    """
    outer = AutoencoderKL.from_pretrained(out_dir.parent / "pipeline" / "vae", torch_dtype=torch.float32)
    autoencoder = train_flux2_autoencoder(outer, seed)
    text_encoder, tokenizer, facts_right = train_text_encoder(seed)
    torch.manual_seed(seed)
    pipeline = new_flux2_pipeline(new_flux2_transformer(), autoencoder, text_encoder, tokenizer)
    train_flux2_teacher(pipeline, seed)
    student = distil_student(pipeline, seed)
    save_pipeline(pipeline, out_dir / BASE)
    pipeline.register_modules(transformer=student)
    pipeline.register_to_config(is_distilled=True)
    save_pipeline(pipeline, out_dir / STUDENT)
    return {"facts_read_right": facts_right, **measure_flux2(out_dir)}


def measure_flux2(directory: Path) -> dict[str, float]:
    """Gold of both saved pipelines with Euler steps, and the loss of the VAE alone."""
    exam = Exam.beside(directory)
    base, student = (_load(directory / name) for name in (BASE, STUDENT))
    restored = decode_patches(base.vae, encode_patches(base.vae, exam.renders))
    return {
        "gold_renders": exam.gold(exam.renders),
        "gold_reconstructions": exam.gold(to_pixels(restored)),
        "gold_28_guided": exam.gold(generate(base, exam.captions, TEACHER_STEPS, GUIDANCE, **CALL)),
        "gold_4_unguided": exam.gold(generate(base, exam.captions, STUDENT_STEPS, 1.0, **CALL)),
        "gold_4_student": exam.gold(generate(student, exam.captions, STUDENT_STEPS, 1.0, **CALL)),
    }


def _load(directory: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
