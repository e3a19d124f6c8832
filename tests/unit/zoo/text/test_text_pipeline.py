"""The shipped pipeline of the text world: what its parts keep of letters, and that many steps draw words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install -e '.[ocr]'")

from reward_servers.scorers.ocr import OcrScorer
from zoo.measuring import GUIDANCE, generate
from zoo.sd3.autoencoder import encode_images
from zoo.text import GoldReader
from zoo.text.captions import sample_requests
from zoo.text.pipeline import LATENT_CHANNELS, begin_with, lessons, reconstruct
from zoo.text.rendering import render_requests
from zoo.text.text_encoders import caption_facts, letter_facts
from zoo.text.tokenizers import MAX_PIECES

ZOO = Path(__file__).parents[4] / "zoo" / "weights"
COUNT = 32
REQUESTS = sample_requests(COUNT, seed=77, held_out=True)
CAPTIONS = [request.caption for request in REQUESTS]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(ZOO / "text", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_autoencoder_keeps_letters_and_its_latents_have_unit_deviation(pipeline: StableDiffusion3Pipeline) -> None:
    renders = render_requests(REQUESTS, seed=77)
    images = reconstruct(pipeline.vae, renders)
    assert OcrScorer.load(None, "cpu").score(images, CAPTIONS, [{}] * COUNT).mean() >= 0.97
    assert GoldReader.load(ZOO / "text_reader", "cpu").score(images, CAPTIONS, [{}] * COUNT).mean() >= 0.8
    latents = encode_images(pipeline.vae, renders)
    assert latents.shape == (COUNT, LATENT_CHANNELS, 16, 16)
    assert abs(latents.std().item() - 1) < 0.1


def test_28_guided_steps_draw_words_that_were_never_seen(pipeline: StableDiffusion3Pipeline) -> None:
    images = generate(pipeline, CAPTIONS, 28, GUIDANCE, text_length=MAX_PIECES)
    assert OcrScorer.load(None, "cpu").score(images, CAPTIONS, [{}] * COUNT).mean() >= 0.65


def test_the_autoencoder_starts_from_the_shapes_world() -> None:
    torch.manual_seed(0)
    model = begin_with(ZOO / "pipeline" / "vae")
    shapes = StableDiffusion3Pipeline.from_pretrained(ZOO / "pipeline", dtype=torch.float32).vae
    assert torch.equal(model.encoder.conv_in.weight, shapes.encoder.conv_in.weight)
    assert model.decoder.conv_in.weight.shape[1] == LATENT_CHANNELS


def test_lessons_have_training_words_only() -> None:
    made = lessons(seed=0, moved=True, count=50)
    assert made.images_NHWC.shape == (50, 64, 64, 3)
    assert made.text_length == MAX_PIECES
    words = {caption.split('"')[1] for caption in made.captions}
    assert words.isdisjoint(request.word for request in sample_requests(2000, seed=1, held_out=True))


def test_the_facts_of_letters_are_where_they_stand() -> None:
    requests = [REQUESTS[0], REQUESTS[1]]
    facts, rows, index = letter_facts(requests)
    lengths = [len(request.word) for request in requests]
    assert rows.tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert index.tolist() == [*range(lengths[0]), *range(lengths[1])]
    assert facts["index"].tolist() == index.tolist()
    assert np.array_equal(caption_facts(requests)["slot 0"], facts["letter"][index == 0])
