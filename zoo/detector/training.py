"""Trains the detector on its own images: another rasteriser, wider jitters, things that overlap or are cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.detector import DetectorScorer
from zoo.detector.reading import COLOUR_CLASSES, SHAPE_CLASSES, Detector, DetectorNet
from zoo.fitting import fit
from zoo.preference.pairs import PAIR_KINDS, held_out_pairs
from zoo.world.scenes import CANVAS, COLOURS, SHAPES, SIZES, render_scenes, sample_scenes

STEPS, BATCH, LEARNING_RATE = 900, 48, 3e-3
SUPERSAMPLING = 2
GREY_LEVELS = {"white": (0.74, 1.0), "black": (0.0, 0.28)}
"""This is wider than the world's own jitter."""
COLOUR_SPREAD = 0.07
RADIUS_SPREAD = 0.1
"""Relative jitter of a radius."""
MOST_THINGS = 5

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Labelled:
    """An image [H, W, 3] in [0, 1] with the colour and the shape class of each pixel [H, W]."""

    image_HWC: Array
    colour_HW: npt.NDArray[np.int64]
    shape_HW: npt.NDArray[np.int64]


def rasterise(shape: str, x: float, y: float, radius: float) -> Array:
    """Fraction of each pixel inside a hard-edged shape, by supersampling; same outlines as `scenes.coverage`."""
    side = CANVAS * SUPERSAMPLING
    grid = (np.arange(side, dtype=np.float32) + 0.5) / SUPERSAMPLING
    dx, dy = (grid[None, :] - x) / radius, (grid[:, None] - y) / radius
    if shape == "circle":
        inside = dx**2 + dy**2 < 1
    elif shape == "square":
        inside = (np.abs(dx) < 0.88) & (np.abs(dy) < 0.88)
    else:
        # Apex 1.237 radii above the centre, base 0.77 below it and two radii wide.
        inside = (dy < 0.77) & (np.abs(dx) < (dy + 1.237) / 2)
    cover: Array = inside.reshape(CANVAS, SUPERSAMPLING, CANVAS, SUPERSAMPLING).mean((1, 3), dtype=np.float32)
    return cover


def draw(rng: np.random.Generator) -> Labelled:
    """Draw one training image with its pixel classes."""
    word = str(rng.choice(list(GREY_LEVELS)))
    image = np.full((CANVAS, CANVAS, 3), rng.uniform(*GREY_LEVELS[word]), np.float32)
    image += rng.uniform(-0.03, 0.03, 3).astype(np.float32)
    colours = np.full((CANVAS, CANVAS), COLOUR_CLASSES.index(word))
    shapes = np.full((CANVAS, CANVAS), SHAPE_CLASSES.index("nothing"))
    for _ in range(int(rng.integers(0, MOST_THINGS + 1))):
        colour, shape, size = (int(rng.integers(len(words))) for words in (COLOURS, SHAPES, SIZES))
        radius = list(SIZES.values())[size] * rng.uniform(1 - RADIUS_SPREAD, 1 + RADIUS_SPREAD)
        cover = rasterise(SHAPES[shape], rng.uniform(3, CANVAS - 3), rng.uniform(3, CANVAS - 3), radius)
        paint = np.asarray(list(COLOURS.values())[colour], np.float32) / np.float32(255)
        paint = paint + rng.uniform(-COLOUR_SPREAD, COLOUR_SPREAD, 3).astype(np.float32)
        image = image * (1 - cover[..., None]) + paint * cover[..., None]
        colours[cover > 0.5], shapes[cover > 0.5] = colour, shape
    noisy = image * rng.uniform(0.94, 1.06) + rng.normal(0, rng.uniform(0, 0.04), image.shape)
    return Labelled(np.clip(noisy, 0, 1).astype(np.float32), colours, shapes)


def _soften(images_BCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur a whole batch slightly, by repeated 3 x 3 averaging."""
    amount = float(rng.uniform(0, 1))
    for _ in range(int(rng.integers(0, 3))):
        padded = F.pad(images_BCHW, (1, 1, 1, 1), mode="replicate")
        images_BCHW = (1 - amount) * images_BCHW + amount * F.avg_pool2d(padded, 3, stride=1)
    return images_BCHW


def train(seed: int, steps: int = STEPS) -> DetectorNet:
    """Train a network; the result depends only on the arguments."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 77])
    net = DetectorNet()

    def loss_of_batch() -> Tensor:
        drawn = [draw(rng) for _ in range(BATCH)]
        pixels = torch.from_numpy(np.stack([one.image_HWC for one in drawn])).permute(0, 3, 1, 2)
        colour, shape = net(_soften(pixels, rng))
        wrong_colour = F.cross_entropy(colour, torch.from_numpy(np.stack([one.colour_HW for one in drawn])))
        wrong_shape = F.cross_entropy(shape, torch.from_numpy(np.stack([one.shape_HW for one in drawn])))
        return wrong_colour + 2 * wrong_shape

    fit(net, "detector", loss_of_batch, steps=steps, rate=LEARNING_RATE, log_every=150)
    return net


def measure(detector: Detector, seed: int, count: int = 500) -> dict[str, float]:
    """Accuracy of reading things on the world's own renders, mean score of right captions, pair accuracy by kind."""
    scenes = sample_scenes(count, seed + 606)
    images = render_scenes(scenes, seed + 607)
    readings = detector.read(images)
    exact = [
        sorted(part.as_thing().words for part in reading.parts) == sorted(thing.words for thing in scene.things)
        for reading, scene in zip(readings, scenes, strict=True)
    ]
    scorer = DetectorScorer(detector)
    captions = [scene.caption for scene in scenes]
    figures = {"exact_images": float(np.mean(exact)), "mean_right": float(scorer.score(images, captions, ()).mean())}
    figures["mean_wrong_caption"] = float(scorer.score(images, captions[1:] + captions[:1], ()).mean())
    for kind in PAIR_KINDS:
        captions, right, wrong = held_out_pairs(kind, 150, seed + 608)
        gap = scorer.score(right, captions, ()) - scorer.score(wrong, captions, ())
        figures[f"pairs_{kind}"] = float((gap > 0).mean())
    for name, value in figures.items():
        print(f"detector {name} {value:.4f}", flush=True)
    return figures


def build_detector(out_dir: Path, seed: int = 3) -> dict[str, float]:
    """Train, save to `out_dir`, and measure what was saved."""
    Detector(train(seed)).save(out_dir)
    return measure(Detector.load(out_dir), seed)
