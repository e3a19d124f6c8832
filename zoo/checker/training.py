"""Trains and calibrates the gold checker on renders, half of them damaged on purpose."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.checker.parsing import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    SHAPE_NAMES,
    SIZE_NAMES,
    STRIDE,
    CellMaps,
    CheckerNet,
    GoldChecker,
    Parse,
    Thresholds,
    to_pixels,
)
from zoo.fitting import fit
from zoo.world.corruptions import (
    KINDS,
    Picture,
    broken_picture,
    clean_picture,
    compose,
    layers_of,
    plain_background,
    soften,
)
from zoo.world.scenes import CANVAS, Scene, Thing, obeys, parse_caption, render_scenes, sample_scene, sample_scenes

STEPS, BATCH, LEARNING_RATE = 1400, 64, 3e-3
CELLS = CANVAS // STRIDE
NEAR = 5.0
"""Cells whose middle is within this many pixels of a thing's centre learn its attributes and offset."""
ACCEPT = 0.97
"""Fraction of intact, decoder-like images whose damage must stay below the threshold."""
DECODED = 0.6
"""Fraction of training images whose things look as after a latent decoder, which does not count as damage."""
PLACE_ERROR = 1.5
"""A place counts as found within this many pixels."""
LESSONS = (*KINDS, "shape_blend", "shape_blend", "colour_blend", "erased", "overlapped", "ghosted image")
"""Kinds of damage to train on; the harder ones occur more often."""

Targets = dict[str, Tensor]


def training_picture(rng: random.Random, noise: np.random.Generator) -> Picture:
    """One training image: 45 % clean, 45 % damaged, 10 % on a background that is not one of ours."""
    scene, draw, decoded = sample_scene(rng), rng.random(), rng.random() < DECODED
    if draw < 0.45:
        picture = clean_picture(scene, noise, jitter=1.4, decoded=decoded)
    elif draw < 0.9:
        picture = broken_picture(scene, rng.choice(LESSONS), noise, decoded)
    else:
        image = compose(layers_of(scene, noise), plain_background("neither", noise))
        nothing = np.zeros((CANVAS, CANVAS), bool)
        picture = Picture(image, scene.things, (False,) * len(scene.things), "neither", nothing)
    image = soften(picture.image_HWC, noise, blur=0.85, noise=0.03)
    return Picture(image, picture.things, picture.broken, picture.background, picture.damage_HW)


def targets_of(pictures: list[Picture]) -> Targets:
    """The maps to learn: those of `_targets_of_one`, stacked."""
    rows = [_targets_of_one(picture) for picture in pictures]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def _targets_of_one(picture: Picture) -> dict[str, npt.NDArray[np.generic]]:
    """`heat` (Gaussian bumps), `peak`, `placed`, `known`, `damage` [h, w]; `offset` [2, h, w]; `words` [3, h, w]."""
    grid_y, grid_x = np.mgrid[0:CELLS, 0:CELLS].astype(np.float32) + 0.5
    heat = np.zeros((CELLS, CELLS), np.float32)
    peak, known, placed = (np.zeros((CELLS, CELLS), bool) for _ in range(3))
    offset, words = np.zeros((2, CELLS, CELLS), np.float32), np.zeros((3, CELLS, CELLS), np.int64)
    for thing, broken in zip(picture.things, picture.broken, strict=True):
        dx, dy = thing.x / STRIDE - grid_x, thing.y / STRIDE - grid_y
        heat = np.maximum(heat, np.exp(-(dx**2 + dy**2) / 1.6).astype(np.float32))
        near = np.hypot(dx, dy) * STRIDE < NEAR
        placed |= near
        known |= near & (not broken)
        offset[:, near] = np.stack([dx, dy])[:, near]
        words[:, near] = np.array(_word_indices(thing))[:, None]
        peak[int(np.clip(thing.y / STRIDE, 0, CELLS - 1)), int(np.clip(thing.x / STRIDE, 0, CELLS - 1))] = True
    damage = np.asarray(picture.damage_HW.reshape(CELLS, STRIDE, CELLS, STRIDE).any((1, 3)), np.float32)
    background = np.int64(BACKGROUND_NAMES.index(picture.background))
    maps = {"heat": heat, "peak": peak, "known": known, "placed": placed, "offset": offset, "words": words}
    return {**maps, "damage": damage, "background": np.asarray(background)}


def _word_indices(thing: Thing) -> tuple[int, int, int]:
    return SIZE_NAMES.index(thing.size), COLOUR_NAMES.index(thing.colour), SHAPE_NAMES.index(thing.shape)


def checker_loss(maps: CellMaps, targets: Targets) -> Tensor:
    """Focal loss of centres (CenterNet, eq. 1), L1 of offsets, cross-entropy of attributes, damage and background."""
    logit, heat, peak = maps.centre_Bhw, targets["heat"], targets["peak"]
    chance = logit.sigmoid()
    hit = F.softplus(-logit) * (1 - chance) ** 2 * peak
    miss = F.softplus(logit) * chance**2 * (1 - heat) ** 4 * ~peak
    centre = (hit.sum() + miss.sum()) / peak.sum().clamp(min=1)
    known, placed = targets["known"].float(), targets["placed"].float()
    offset = ((maps.offset_B2hw - targets["offset"]).abs().sum(1) * placed).sum() / placed.sum().clamp(min=1)
    words = torch.zeros(())
    for index, logits in enumerate((maps.size_Bkhw, maps.colour_Bkhw, maps.shape_Bkhw)):
        words = words + (F.cross_entropy(logits, targets["words"][:, index], reduction="none") * known).sum()
    damage = F.binary_cross_entropy_with_logits(maps.damage_Bhw, targets["damage"])
    worst, any_damage = maps.damage_Bhw.amax((1, 2)), targets["damage"].amax((1, 2))
    spoilt = F.binary_cross_entropy_with_logits(worst, any_damage)
    background = F.cross_entropy(maps.background_Bk, targets["background"])
    return centre + offset + words / known.sum().clamp(min=1) + 6 * damage + 0.5 * spoilt + 0.5 * background


def train(seed: int, steps: int = STEPS, log_every: int = 250) -> CheckerNet:
    """Train a network; the result depends only on `seed` and `steps`."""
    torch.manual_seed(seed)
    rng, noise = random.Random(f"checker {seed}"), np.random.default_rng([seed, 1])
    net = CheckerNet()

    def loss_of_batch() -> Tensor:
        pictures = [training_picture(rng, noise) for _ in range(BATCH)]
        pixels = to_pixels(np.stack([picture.image_HWC for picture in pictures]))
        return checker_loss(net(pixels), targets_of(pictures))

    fit(net, "checker", loss_of_batch, steps=steps, rate=LEARNING_RATE, log_every=log_every)
    return net


# --- calibration and figures ---------------------------------------------------------------------------------------


def quantised(images: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.uint8]:
    """float [H, W, 3] each -> uint8 [B, H, W, 3], the format of a sampler's output."""
    return np.round(np.clip(np.stack(images), 0, 1) * 255).astype(np.uint8)


def mild_images(scenes: list[Scene], noise: np.random.Generator, decoded: bool = False) -> npt.NDArray[np.uint8]:
    """Intact images with tolerable softening; with `decoded` also with the look of a latent decoder."""
    pictures = [clean_picture(scene, noise, decoded=decoded) for scene in scenes]
    return quantised([soften(picture.image_HWC, noise) for picture in pictures])


def broken_images(scenes: list[Scene], kind: str, noise: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Damaged images of one kind."""
    return quantised([broken_picture(scene, kind, noise).image_HWC for scene in scenes])


def calibrate(net: CheckerNet, seed: int) -> Thresholds:
    """Choose the damage threshold that `ACCEPT` of the decoder-like images of a separate set pass."""
    checker = GoldChecker(net, Thresholds())
    scenes, noise = sample_scenes(1500, seed + 101), np.random.default_rng([seed, 2])
    damage = [parse.damage for parse in checker.parse(mild_images(scenes, noise, decoded=True))]
    return Thresholds(damage=round(float(np.clip(np.quantile(damage, ACCEPT), 0.2, 0.9)), 4))


def measure(checker: GoldChecker, seed: int, count: int = 1000) -> dict[str, float]:
    """Figures on scenes used neither in training nor in calibration."""
    scenes, noise = sample_scenes(count, seed + 202), np.random.default_rng([seed, 3])
    captions = [scene.caption for scene in scenes]
    clean = render_scenes(scenes, seed + 303)
    figures = _attribute_accuracy(checker.parse(clean), scenes)
    figures["clean_obeys"] = float(checker.verdict(clean, captions).mean())
    figures["mild_obeys"] = float(checker.verdict(mild_images(scenes, noise), captions).mean())
    figures["decoded_obeys"] = float(checker.verdict(mild_images(scenes, noise, decoded=True), captions).mean())
    figures["wrong_caption_obeys"] = float(checker.verdict(clean, captions[1:] + captions[:1]).mean())
    rejected = []
    for kind in KINDS:
        images = broken_images(scenes[:300], kind, noise)
        rejected.append(1 - float(checker.verdict(images, captions[:300]).mean()))
        figures[f"rejects_{kind.replace(' ', '_')}"] = rejected[-1]
    figures["rejects_broken"] = float(np.mean(rejected))
    return figures


def _attribute_accuracy(parses: list[Parse], scenes: list[Scene]) -> dict[str, float]:
    """Fraction of drawn things that the nearest found thing matches, per attribute; count and background per image."""
    right: dict[str, list[bool]] = {"size": [], "colour": [], "shape": [], "place": []}
    for parse, scene in zip(parses, scenes, strict=True):
        for thing in scene.things:
            nearest = min(parse.things, key=lambda found: np.hypot(found.x - thing.x, found.y - thing.y), default=None)
            for name, hits in right.items():
                hits.append(nearest is not None and _agrees(name, nearest, thing))
    figures = {f"accuracy_{name}": float(np.mean(hits)) for name, hits in right.items()}
    pairs = list(zip(parses, scenes, strict=True))
    figures["accuracy_count"] = float(np.mean([len(parse.things) == len(scene.things) for parse, scene in pairs]))
    figures["accuracy_background"] = float(np.mean([parse.background == scene.background for parse, scene in pairs]))
    figures["parse_obeys"] = float(
        np.mean([obeys(parse_caption(scene.caption), parse.things, parse.background) for parse, scene in pairs])
    )
    return figures


def _agrees(name: str, found: Thing, drawn: Thing) -> bool:
    if name == "place":
        return bool(np.hypot(found.x - drawn.x, found.y - drawn.y) < PLACE_ERROR)
    index = ("size", "colour", "shape").index(name)
    return found.words[index] == drawn.words[index]


def build_checker(out_dir: Path, seed: int = 0) -> dict[str, float]:
    """Train, calibrate, save to `out_dir`, and measure what was saved."""
    GoldChecker(train(seed), Thresholds()).save(out_dir)
    rounded = GoldChecker.load(out_dir)
    GoldChecker(rounded.net, calibrate(rounded.net, seed)).save(out_dir)
    figures = measure(GoldChecker.load(out_dir), seed)
    for name, value in figures.items():
        print(f"checker {name} {value:.4f}", flush=True)
    return figures
