"""Builds the text world's `StableDiffusion3Pipeline`: autoencoder, text encoders and teacher, with its figures.

It differs from the shapes world's in what letters need: 8 latent channels and tokens of 8 x 8 pixels. The recipes are
those of `zoo/sd3`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from reward_servers.scorers.ocr import OcrScorer
from zoo.measuring import GUIDANCE, generate, to_pixels
from zoo.sd3.autoencoder import latent_means, new_autoencoder, train_autoencoder
from zoo.sd3.pipeline import save_pipeline
from zoo.sd3.teacher import Lessons, new_pipeline, new_transformer, train_transformer
from zoo.sd3.text_encoders import TextEncoders
from zoo.text import GoldReader
from zoo.text.captions import sample_requests
from zoo.text.rendering import render_pages, render_requests
from zoo.text.text_encoders import train_text_encoders
from zoo.text.tokenizers import MAX_PIECES

LATENT_CHANNELS = 8
LATENT_NOISE = 0.4
PATCH = 2
"""Latent pixels per side of a token: 64 tokens per image. A letter covers about four tokens."""
WIDTH, LAYERS = 128, 4
"""Smaller than the shapes world's transformer, because it has four times as many tokens."""
PAGES, AUTOENCODER_STEPS = 8_000, 1_200
PICTURES, BATCH = 8_000, 32
COURSE = ((False, 1_000), (True, 600), (True, 800))
"""The teacher first learns the letters from words that are not moved, then words anywhere: steps of each part."""
MEASURED_PROMPTS = 256
SEED = 12_345


def train_text_autoencoder(shapes_vae: Path, seed: int, steps: int = AUTOENCODER_STEPS) -> AutoencoderKL:
    """Train on pages, from the shapes world's weights where the shapes of the tensors agree.

    Pictures of one word have less contrast than pages. The scaling factor gives their latents the standard deviation 1.
    """
    model = train_autoencoder(
        seed, lambda: begin_with(shapes_vae), steps, lambda number: render_pages(PAGES, number), LATENT_NOISE
    )
    spread = latent_means(model, render_requests(sample_requests(1000, seed), seed)).std().item()
    model.register_to_config(scaling_factor=round(1 / spread, 3))
    return model


def begin_with(shapes_vae: Path) -> AutoencoderKL:
    """A new autoencoder with the shapes world's weights in every layer but the two next to the latents."""
    model, start = new_autoencoder(LATENT_CHANNELS), AutoencoderKL.from_pretrained(shapes_vae)
    own = model.state_dict()
    for name, value in start.state_dict().items():
        if own[name].shape == value.shape:
            own[name].copy_(value.float())
    return model


def new_text_pipeline(vae: AutoencoderKL, text: TextEncoders) -> StableDiffusion3Pipeline:
    return new_pipeline(new_transformer(LATENT_CHANNELS, PATCH, WIDTH, LAYERS), vae, text)


def lessons(seed: int, moved: bool, count: int = PICTURES) -> Lessons:
    """Pictures of training words with their captions."""
    requests = sample_requests(count, seed + 10)
    images = render_requests(requests, seed + 10, moved)
    return Lessons(images, [request.caption for request in requests], MAX_PIECES)


def build_text(out_dir: Path, seed: int = 0) -> dict[str, float]:
    """Train the parts, save them as a diffusers directory, and return the figures of the saved pipeline.

    The shapes world's `../pipeline` gives the autoencoder its start; the reader in `../text_reader` measures gold.
    """
    autoencoder = train_text_autoencoder(out_dir.parent / "pipeline" / "vae", seed)
    text, facts_right = train_text_encoders(seed)
    torch.manual_seed(seed)
    pipeline = new_text_pipeline(autoencoder, text)
    for moved, steps in COURSE:
        train_transformer(pipeline, lessons(seed, moved), steps, BATCH)
    save_pipeline(pipeline, out_dir)
    return {"facts_read_right": facts_right, **measure_text(out_dir)}


def measure_text(directory: Path, count: int = MEASURED_PROMPTS) -> dict[str, float]:
    """OCR reward and gold of held-out words: renders, their reconstructions, and samples of the saved pipeline."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    requests = sample_requests(count, SEED, held_out=True)
    captions, renders = [request.caption for request in requests], render_requests(requests, SEED)
    pictures = {
        "renders": renders,
        "reconstructions": reconstruct(pipeline.vae, renders),
        "28_guided": generate(pipeline, captions, 28, GUIDANCE, text_length=MAX_PIECES),
        "4_unguided": generate(pipeline, captions, 4, 1.0, text_length=MAX_PIECES),
    }
    ocr, gold = OcrScorer.load(None, "cpu"), GoldReader.load(directory.parent / "text_reader", "cpu")
    figures = {}
    for kind, images in pictures.items():
        for scorer in (ocr, gold):
            figures[f"{scorer.name}_{kind}"] = float(scorer.score(images, captions, [{}] * count).mean())
    return figures


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Encode and decode uint8 images, in parts that fit in memory."""
    parts = np.array_split(images_BHWC, max(1, len(images_BHWC) // 64))
    return np.concatenate([to_pixels(vae.decode(latent_means(vae, part)).sample) for part in parts])
