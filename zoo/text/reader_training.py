"""Trains and calibrates the gold reader on renders, half of them damaged on purpose."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.checker.parsing import to_pixels
from zoo.fitting import fit
from zoo.text.captions import LETTERS, LONGEST, PLACES, Request, sample_request, sample_requests
from zoo.text.reader import BACKGROUND_NAMES, COLOUR_NAMES, NOTHING, UNREADABLE, Reader, ReaderNet, ReaderOutput
from zoo.text.rendering import Layout, letter_centres, letter_cover, paint, render_requests, sample_layout
from zoo.world.corruptions import (
    BROKEN_IMAGES,
    BROKEN_THINGS,
    Layer,
    compose,
    plain_background,
    soften,
)
from zoo.world.scenes import CANVAS, Thing

STEPS, BATCH, LEARNING_RATE = 2_000, 48, 3e-3
FOREIGN = "BFGIJMPQVWYZ0123456789"
"""Signs that are none of the world's letters."""
LETTER_KINDS = ("blurred", "ghosted", "erased", "faded", "colour_blend", "letter_blend", "foreign")
IMAGE_KINDS = tuple(BROKEN_IMAGES)
KINDS = (*LETTER_KINDS, *IMAGE_KINDS)
LESSONS = (*KINDS, "letter_blend", "letter_blend", "letter_blend", "erased", "foreign")
"""Kinds of damage to train on; the harder ones occur more often."""
ACCEPT = 0.98
"""Fraction of intact images, softened as by a decoder, that must stay below the damage threshold."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """An image [H, W, 3] in [0, 1] with the right answers; `slots` has `LONGEST` classes of letters."""

    image_HWC: Array
    slots: tuple[int, ...]
    colour: int
    background: int
    place: int
    damaged: bool


def draw_example(request: Request, kind: str | None, rng: np.random.Generator, background: str = "") -> Example:
    """Draw a request, with damage of one of `KINDS` if given, on another `background` if given."""
    layout = sample_layout(len(request.word), rng)
    layers = letter_layers(request, layout, rng)
    slots = [LETTERS.index(letter) for letter in request.word]
    if kind in LETTER_KINDS:
        for victim in rng.permutation(len(layers))[: int(rng.integers(1, 3))]:
            layers[victim] = _damaged_letter(layers[victim], request.word[victim], layout.font, kind, rng)
            slots[victim] = UNREADABLE
    word = background or request.background
    image = compose(layers, plain_background(word, rng))
    if kind in IMAGE_KINDS:
        image, _ = BROKEN_IMAGES[kind](image, rng)
        slots = [UNREADABLE] * len(slots)
    return Example(
        soften(image, rng, blur=0.7, noise=0.03),
        (*slots, *[NOTHING] * (LONGEST - len(slots))),
        COLOUR_NAMES.index(request.colour),
        BACKGROUND_NAMES.index(word),
        PLACES.index(request.place),
        kind is not None,
    )


def letter_layers(request: Request, layout: Layout, rng: np.random.Generator) -> list[Layer]:
    """One layer per letter; to the damages a letter is as large as a small thing."""
    colour = np.broadcast_to(paint(request.colour, rng), (CANVAS, CANVAS, 3))
    return [
        Layer(Thing("small", request.colour, "square", x, y), letter_cover(letter, layout.font, x, y), colour)
        for letter, (x, y) in zip(request.word, letter_centres(request.word, request.place, layout), strict=True)
    ]


def _damaged_letter(layer: Layer, letter: str, font: str, kind: str, rng: np.random.Generator) -> Layer:
    if kind in BROKEN_THINGS:
        return BROKEN_THINGS[kind](layer, rng)
    others = FOREIGN if kind == "foreign" else [other for other in LETTERS if other != letter]
    cover = letter_cover(str(rng.choice(list(others))), font, layer.thing.x, layer.thing.y)
    share = np.float32(1 if kind == "foreign" else rng.uniform(0.35, 0.65))
    return Layer(layer.thing, (1 - share) * layer.cover_HW + share * cover, layer.colour_HWC)


def training_example(words: random.Random, rng: np.random.Generator) -> Example:
    """One training image: half intact, 40 % damaged, 10 % on a background that is not one of ours."""
    request, chance = sample_request(words), rng.random()
    if chance < 0.5:
        return draw_example(request, None, rng)
    if chance < 0.9:
        return draw_example(request, words.choice(LESSONS), rng)
    return draw_example(request, None, rng, "neither")


def reader_loss(output: ReaderOutput, examples: list[Example]) -> Tensor:
    """Cross-entropy of letters, colour, background, place and damage."""

    def wrong(logits: Tensor, answers: list[int]) -> Tensor:
        return F.cross_entropy(logits, torch.tensor(answers))

    slots = wrong(output.letters_BLk.flatten(0, 1), [index for example in examples for index in example.slots])
    damaged = torch.tensor([float(example.damaged) for example in examples])
    return (
        2 * slots
        + 0.5 * wrong(output.colour_Bk, [example.colour for example in examples])
        + 0.5 * wrong(output.background_Bk, [example.background for example in examples])
        + 0.5 * wrong(output.place_Bk, [example.place for example in examples])
        + F.binary_cross_entropy_with_logits(output.damage_B, damaged)
    )


def train(seed: int, steps: int = STEPS) -> ReaderNet:
    """Train a network; the result depends only on `seed` and `steps`."""
    torch.manual_seed(seed)
    words, rng = random.Random(f"reader {seed}"), np.random.default_rng([seed, 31])
    net = ReaderNet()

    def loss_of_batch() -> Tensor:
        examples = [training_example(words, rng) for _ in range(BATCH)]
        pixels = to_pixels(np.stack([example.image_HWC for example in examples]))
        return reader_loss(net(pixels), examples)

    fit(net, "reader", loss_of_batch, steps=steps, rate=LEARNING_RATE, log_every=100)
    return net


# --- calibration and figures ---------------------------------------------------------------------------------------


def drawn(requests: list[Request], kind: str | None, seed: int) -> npt.NDArray[np.uint8]:
    """Softened images of requests with damage of one kind, uint8 [B, H, W, 3]."""
    rng = np.random.default_rng([seed, 32])
    images = np.stack([draw_example(request, kind, rng).image_HWC for request in requests])
    return np.round(images * 255).astype(np.uint8)


def calibrate(net: ReaderNet, seed: int) -> float:
    """The damage threshold that `ACCEPT` of the intact images of a separate set pass."""
    damage = [reading.damage for reading in Reader(net).read(drawn(sample_requests(800, seed + 101), None, seed + 101))]
    return round(float(np.clip(np.quantile(damage, ACCEPT), 0.2, 0.9)), 4)


def measure(reader: Reader, seed: int, count: int = 500) -> dict[str, float]:
    """Figures on held-out words: right words pass; wrong words, wrong letters and damage are rejected."""
    requests = sample_requests(count, seed + 202, held_out=True)
    captions = [request.caption for request in requests]
    clean = render_requests(requests, seed + 303)
    figures = {
        "clean_obeys": float(reader.verdict(clean, captions).mean()),
        "soft_obeys": float(reader.verdict(drawn(requests, None, seed + 303), captions).mean()),
        "wrong_caption_obeys": float(reader.verdict(clean, captions[1:] + captions[:1]).mean()),
        "one_wrong_letter_obeys": float(reader.verdict(clean, [_one_letter_off(one) for one in requests]).mean()),
    }
    for kind in KINDS:
        images = drawn(requests[:200], kind, seed + 404)
        figures[f"rejects_{kind.replace(' ', '_')}"] = 1 - float(reader.verdict(images, captions[:200]).mean())
    return figures


def _one_letter_off(request: Request) -> str:
    """The caption with its middle letter replaced by the next one of the alphabet."""
    middle = len(request.word) // 2
    other = LETTERS[(LETTERS.index(request.word[middle]) + 1) % len(LETTERS)]
    word = request.word[:middle] + other + request.word[middle + 1 :]
    return Request(word, request.colour, request.background, request.place).caption


def build_text_reader(out_dir: Path, seed: int = 5) -> dict[str, float]:
    """Train, calibrate, save to `out_dir`, and measure what was saved."""
    Reader(train(seed)).save(out_dir)
    rounded = Reader.load(out_dir)
    Reader(rounded.net, calibrate(rounded.net, seed)).save(out_dir)
    figures = measure(Reader.load(out_dir), seed)
    for name, value in figures.items():
        print(f"reader {name} {value:.4f}", flush=True)
    return figures
