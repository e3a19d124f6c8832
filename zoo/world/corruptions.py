"""Typical failures of generated images, drawn on purpose: the negatives of every scoring model in the zoo.

A scene is first split into layers (each thing's coverage per pixel and its colour). `BROKEN_THINGS` damage one layer,
`BROKEN_IMAGES` damage the finished image, "cut" pushes a thing across the border. `soften` is not damage: it is the
slight loss of a good decoder, which a scorer must tolerate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from zoo.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOUR_JITTER,
    COLOURS,
    RADIUS_JITTER,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    coverage,
)

Array = npt.NDArray[np.float32]

MILD_BLUR = 0.6
"""An image counts as intact up to this Gaussian blur, sigma in pixels."""
MILD_NOISE = 0.02
"""An image counts as intact up to this standard deviation of pixel noise."""
STRONG_BLUR = 2.0
"""An image counts as damaged from this Gaussian blur on, sigma in pixels."""
FOOTPRINT = 0.15
"""A pixel belongs to a thing from this coverage on."""


@dataclass(frozen=True)
class Layer:
    """One thing ready to paint: `cover_HW` in [0, 1], `colour_HWC` in [0, 1]."""

    thing: Thing
    cover_HW: Array
    colour_HWC: Array


@dataclass(frozen=True)
class Picture:
    """An image with all labels that a detector could learn.

    Attributes:
        image_HWC: float32 [H, W, 3] in [0, 1].
        things: the things drawn, including damaged ones.
        broken: whether each thing is damaged.
        background: a background word, or "neither".
        damage_HW: bool [H, W], the damaged pixels.
    """

    image_HWC: Array
    things: tuple[Thing, ...]
    broken: tuple[bool, ...]
    background: str
    damage_HW: npt.NDArray[np.bool_]


@lru_cache(maxsize=256)
def _blur_matrix(sigma: float) -> Array:
    """Gaussian blur along one axis as a matrix [64, 64]; rows sum to one, so borders stay bright."""
    index = np.arange(CANVAS)
    weight = np.exp(-0.5 * ((index[:, None] - index[None, :]) / max(sigma, 1e-3)) ** 2)
    matrix: Array = (weight / weight.sum(1, keepdims=True)).astype(np.float32)
    return matrix


@lru_cache(maxsize=16)
def _resample_matrix(side: int) -> Array:
    """Area average down to `side` samples and linear interpolation back up, along one axis, as a matrix [64, 64]."""
    edges = np.linspace(0, CANVAS, side + 1)
    pixel = np.arange(CANVAS)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    down = np.clip(overlap, 0, None) / (CANVAS / side)
    position = np.clip((pixel + 0.5) * side / CANVAS - 0.5, 0, side - 1)
    up = np.clip(1 - np.abs(position[:, None] - np.arange(side)[None, :]), 0, None)
    matrix: Array = (up @ down).astype(np.float32)
    return matrix


def _apply(matrix: Array, plane: Array) -> Array:
    """Apply one matrix along both axes of [H, W] or [H, W, 3]."""
    if plane.ndim == 2:
        columns: Array = matrix @ plane
        both: Array = columns @ matrix.T
        return both
    return np.stack([_apply(matrix, plane[..., channel]) for channel in range(plane.shape[-1])], -1)


def gaussian_blur(plane: Array, sigma: float) -> Array:
    """Blur [H, W] or [H, W, 3] by a Gaussian of `sigma` pixels (quantised to 0.05)."""
    return _apply(_blur_matrix(round(sigma * 20) / 20), plane)


def _shift(plane: Array, dx: int, dy: int, fill: float = 0.0) -> Array:
    """Move the content by whole pixels; pixels from outside get the value `fill`."""
    moved = np.full_like(plane, fill)
    source = plane[max(0, -dy) : CANVAS - max(0, dy), max(0, -dx) : CANVAS - max(0, dx)]
    moved[max(0, dy) : max(0, dy) + source.shape[0], max(0, dx) : max(0, dx) + source.shape[1]] = source
    return moved


def _colour(name: str, rng: np.random.Generator, jitter: float = COLOUR_JITTER) -> Array:
    colour = np.asarray(COLOURS[name], np.float32) / 255 + rng.uniform(-jitter, jitter, 3)
    return np.broadcast_to(np.clip(colour, 0, 1).astype(np.float32), (CANVAS, CANVAS, 3))


def _radius(size: str, rng: np.random.Generator, jitter: float = RADIUS_JITTER) -> float:
    return float(SIZES[size] + rng.uniform(-jitter, jitter))


def layers_of(scene: Scene, rng: np.random.Generator, jitter: float = 1.0, decoded: bool = False) -> list[Layer]:
    """Split a scene into layers; `jitter` scales the jitter of radius and colour; for `decoded` see `_decoded`."""
    layers = []
    for thing in scene.things:
        cover = coverage(thing.shape, thing.x, thing.y, _radius(thing.size, rng, jitter * RADIUS_JITTER))
        layer = Layer(thing, cover, _colour(thing.colour, rng, jitter * COLOUR_JITTER))
        layers.append(_decoded(layer, rng) if decoded else layer)
    return layers


def _decoded(layer: Layer, rng: np.random.Generator) -> Layer:
    """A thing with the look of a small latent decoder: rounder corners, uneven inside, slightly changed colour."""
    sigma = rng.uniform(0.6, 2.0)
    # The blurred outline has slope 0.4 / sigma: raise it to a slope per pixel that looks sharp again.
    slope = rng.uniform(max(0.3, 0.4 / sigma), 0.9)
    blurred = gaussian_blur(layer.cover_HW, sigma)
    cover = np.clip(0.5 + (blurred - 0.5) * slope * sigma / 0.4, 0, 1)
    texture = gaussian_blur(rng.normal(0, 1, (CANVAS, CANVAS, 3)).astype(np.float32), rng.uniform(0.8, 2.5))
    texture *= rng.uniform(0, 0.06) / texture.std()
    drift = rng.uniform(-0.04, 0.04, 3)
    colour = np.clip(layer.colour_HWC + texture + drift, 0, 1)
    return replace(layer, cover_HW=cover.astype(np.float32), colour_HWC=colour.astype(np.float32))


def compose(layers: list[Layer], background_HWC: Array) -> Array:
    """Paint the layers over a background, float32 [H, W, 3]."""
    image = background_HWC
    for layer in layers:
        cover = layer.cover_HW[..., None]
        image = image * (1 - cover) + layer.colour_HWC * cover
    return image


def plain_background(word: str, rng: np.random.Generator) -> Array:
    """A background of the grey level `word` names, or for "neither" a mid grey or a tint."""
    if word != "neither":
        level = np.full(3, rng.uniform(*BACKGROUNDS[word]))
    elif rng.random() < 0.5:
        level = np.full(3, rng.uniform(0.32, 0.70))
    else:
        level = rng.uniform(0.1, 0.9) + rng.permutation([-0.2, 0.0, 0.2]) * rng.uniform(0.8, 1.4)
    return np.broadcast_to(np.clip(level, 0, 1).astype(np.float32), (CANVAS, CANVAS, 3))


# --- damage to one thing -------------------------------------------------------------------------------------------


def _blurred(layer: Layer, rng: np.random.Generator) -> Layer:
    return replace(layer, cover_HW=gaussian_blur(layer.cover_HW, rng.uniform(1.7, 4.0)))


def _ghosted(layer: Layer, rng: np.random.Generator) -> Layer:
    """A second, weaker copy beside the first."""
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(3.0, 8.0)
    copy = _shift(layer.cover_HW, round(distance * np.cos(angle)), round(distance * np.sin(angle)))
    cover = np.maximum(layer.cover_HW * rng.uniform(0.6, 1.0), copy * rng.uniform(0.35, 0.8))
    return replace(layer, cover_HW=cover)


def _erased(layer: Layer, rng: np.random.Generator) -> Layer:
    """Remove a straight or a round piece."""
    thing, radius = layer.thing, SIZES[layer.thing.size]
    grid_y, grid_x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) + 0.5
    angle = rng.uniform(0, 2 * np.pi)
    across = (grid_x - thing.x) * np.cos(angle) + (grid_y - thing.y) * np.sin(angle)
    if rng.random() < 0.6:
        missing = across - rng.uniform(-0.3, 0.25) * radius
    else:
        offset = rng.uniform(0.0, 0.8) * radius
        hole_x, hole_y = thing.x + offset * np.cos(angle), thing.y + offset * np.sin(angle)
        missing = rng.uniform(0.45, 0.75) * radius - np.hypot(grid_x - hole_x, grid_y - hole_y)
    keep = 1 / (1 + np.exp(np.clip(missing * rng.uniform(0.8, 2.5), -30, 30)))
    return replace(layer, cover_HW=(layer.cover_HW * keep).astype(np.float32))


def _faded(layer: Layer, rng: np.random.Generator) -> Layer:
    return replace(layer, cover_HW=layer.cover_HW * np.float32(rng.uniform(0.25, 0.6)))


def _shape_blend(layer: Layer, rng: np.random.Generator) -> Layer:
    """Blend two shapes, half transparent over each other."""
    other = str(rng.choice([shape for shape in SHAPES if shape != layer.thing.shape]))
    cover = coverage(other, layer.thing.x, layer.thing.y, _radius(layer.thing.size, rng))
    share = rng.uniform(0.4, 0.6)
    return replace(layer, cover_HW=((1 - share) * layer.cover_HW + share * cover).astype(np.float32))


def _colour_blend(layer: Layer, rng: np.random.Generator) -> Layer:
    """Give one thing two colours, one on each side, with a soft or a hard border."""
    other = str(rng.choice([name for name in COLOURS if name != layer.thing.colour]))
    grid_y, grid_x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) + 0.5
    angle = rng.uniform(0, 2 * np.pi)
    across = (grid_x - layer.thing.x) * np.cos(angle) + (grid_y - layer.thing.y) * np.sin(angle)
    share = 1 / (1 + np.exp(np.clip(-across * rng.uniform(0.25, 2.0), -30, 30)))[..., None]
    return replace(layer, colour_HWC=(layer.colour_HWC * (1 - share) + _colour(other, rng) * share).astype(np.float32))


def _overlapped(layer: Layer, rng: np.random.Generator) -> Layer:
    """Put another thing in front of this one."""
    thing = layer.thing
    size, shape = str(rng.choice(list(SIZES))), str(rng.choice(SHAPES))
    angle = rng.uniform(0, 2 * np.pi)
    distance = rng.uniform(0.4, 0.8) * (SIZES[thing.size] + SIZES[size])
    x, y = thing.x + distance * np.cos(angle), thing.y + distance * np.sin(angle)
    cover = coverage(shape, x, y, _radius(size, rng))
    colour = _colour(str(rng.choice(list(COLOURS))), rng)
    mixed = layer.colour_HWC * (1 - cover[..., None]) + colour * cover[..., None]
    return replace(layer, cover_HW=np.maximum(layer.cover_HW, cover), colour_HWC=mixed.astype(np.float32))


BROKEN_THINGS: dict[str, Callable[[Layer, np.random.Generator], Layer]] = {
    "blurred": _blurred,
    "ghosted": _ghosted,
    "erased": _erased,
    "faded": _faded,
    "shape_blend": _shape_blend,
    "colour_blend": _colour_blend,
    "overlapped": _overlapped,
}


# --- damage to the whole picture -----------------------------------------------------------------------------------


def _blurred_image(image: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    return gaussian_blur(image, rng.uniform(STRONG_BLUR, 5.0)), np.zeros((CANVAS, CANVAS), np.float32)


def _ghosted_image(image: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Average the image and a shifted copy of it."""
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(3.0, 9.0)
    grey = float(np.median(image))
    copy = _shift(image, round(distance * np.cos(angle)), round(distance * np.sin(angle)), grey)
    share = rng.uniform(0.3, 0.6)
    mixed = (1 - share) * image + share * copy
    return mixed, np.abs(mixed - image).max(-1)


def _smeared(image: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Reduce the image to 8 to 14 pixels per side and enlarge it."""
    return _apply(_resample_matrix(int(rng.integers(8, 15))), image), np.zeros((CANVAS, CANVAS), np.float32)


def _stained(image: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Add soft blobs of a foreign colour or grey."""
    grid_y, grid_x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) + 0.5
    blob = np.zeros((CANVAS, CANVAS), np.float32)
    for _ in range(int(rng.integers(1, 4))):
        x, y, spread = rng.uniform(4, CANVAS - 4), rng.uniform(4, CANVAS - 4), rng.uniform(2.5, 8.0)
        stretch = rng.uniform(0.5, 2.0)
        blob = np.maximum(blob, np.exp(-0.5 * (((grid_x - x) * stretch) ** 2 + (grid_y - y) ** 2) / spread**2))
    colour = rng.uniform(0, 1, 3).astype(np.float32)
    grey = np.median(image, axis=(0, 1))
    colour += np.sign(colour - grey) * np.float32(0.1)
    blob *= np.float32(rng.uniform(0.45, 1.0))
    stained = image * (1 - blob[..., None]) + np.clip(colour, 0, 1) * blob[..., None]
    return stained, np.abs(stained - image).max(-1)


BROKEN_IMAGES: dict[str, Callable[[Array, np.random.Generator], tuple[Array, Array]]] = {
    "blurred image": _blurred_image,
    "ghosted image": _ghosted_image,
    "smeared": _smeared,
    "stained": _stained,
}
"""Each returns the damaged image and each pixel's change [H, W], which is all zero if the things themselves broke."""
KINDS = (*BROKEN_THINGS, *BROKEN_IMAGES, "cut")


# --- pictures ------------------------------------------------------------------------------------------------------


def soften(image: Array, rng: np.random.Generator, blur: float = MILD_BLUR, noise: float = MILD_NOISE) -> Array:
    """Apply a decoder's slight, tolerable loss: blur up to `blur`, noise up to `noise`, a little brightness."""
    sigma = rng.uniform(0, blur)
    soft = gaussian_blur(image, sigma) if sigma > 0.15 else image
    noisy = soft + rng.normal(0, rng.uniform(0, noise), image.shape)
    softened: Array = np.clip(noisy * rng.uniform(0.97, 1.03), 0, 1).astype(np.float32)
    return softened


def clean_picture(scene: Scene, rng: np.random.Generator, jitter: float = 1.0, decoded: bool = False) -> Picture:
    """Draw a scene without damage."""
    image = compose(layers_of(scene, rng, jitter, decoded), plain_background(scene.background, rng))
    nothing = np.zeros((CANVAS, CANVAS), bool)
    return Picture(image, scene.things, (False,) * len(scene.things), scene.background, nothing)


def broken_picture(scene: Scene, kind: str, rng: np.random.Generator, decoded: bool = False) -> Picture:
    """Draw a scene with damage of one of `KINDS`; at least one thing, or the background, is damaged."""
    if kind == "cut":
        return _cut_picture(scene, rng)
    layers = layers_of(scene, rng, decoded=decoded)
    background = plain_background(scene.background, rng)
    if kind in BROKEN_THINGS:
        victim = int(rng.integers(len(layers)))
        before = layers[victim]
        layers[victim] = BROKEN_THINGS[kind](before, rng)
        broken = tuple(index == victim for index in range(len(layers)))
        damage = np.maximum(before.cover_HW, layers[victim].cover_HW) > FOOTPRINT
        return Picture(compose(layers, background), scene.things, broken, scene.background, damage)
    image, change = BROKEN_IMAGES[kind](compose(layers, background), rng)
    if kind == "stained":
        return Picture(image, scene.things, (False,) * len(layers), scene.background, change > 0.06)
    damage = np.max([layer.cover_HW for layer in layers], axis=0) > FOOTPRINT
    return Picture(image, scene.things, (True,) * len(layers), scene.background, damage | (change > 0.06))


def _cut_picture(scene: Scene, rng: np.random.Generator) -> Picture:
    """Draw one thing across the border, with a large part of it outside."""
    victim = int(rng.integers(len(scene.things)))
    thing = scene.things[victim]
    inside = SIZES[thing.size] * rng.uniform(-0.3, 0.5)
    side = int(rng.integers(4))
    if side < 2:
        moved = replace(thing, x=inside if side == 0 else CANVAS - inside)
    else:
        moved = replace(thing, y=inside if side == 2 else CANVAS - inside)
    things = tuple(moved if index == victim else other for index, other in enumerate(scene.things))
    layers = layers_of(replace(scene, things=things), rng)
    image = compose(layers, plain_background(scene.background, rng))
    broken = tuple(index == victim for index in range(len(things)))
    return Picture(image, things, broken, scene.background, layers[victim].cover_HW > FOOTPRINT)
