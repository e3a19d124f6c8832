"""The shapes world: scenes of coloured shapes, their captions, and the definition of an image that obeys its caption.

A scene has one to three things on a plain background. Its caption names every thing (size, colour, shape), the first
one's place relative to each of the others, and the background:

    small red circle above big blue square and left of small green triangle on white

Positions are continuous, so a caption has many right images. A generator of few steps turns that freedom into blurred
or doubled shapes.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CANVAS = 64
"""Side of an image, in pixels."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 40),
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, float] = {"small": 6.5, "big": 11.0}
"""Each size word maps to a radius in pixels."""
BACKGROUNDS: dict[str, tuple[float, float]] = {"white": (0.86, 0.98), "black": (0.06, 0.18)}
"""Each background word maps to the range of its grey level."""
RELATIONS = ("above", "below", "left of", "right of")

MAX_THINGS = 3
CELL = CANVAS // 2
CELL_JITTER = 6.0
"""In the generator's scenes a thing is in one of 2 x 2 cells, at most this many pixels off its middle.

This decides how hard few steps are: with 3 pixels, 4 unguided steps reach nearly the result of 28 guided ones.
"""
EDGE_MARGIN = 1.5
"""Smallest distance of an outline from the edge of the image, in pixels."""
RADIUS_JITTER = 0.5
COLOUR_JITTER = 0.04
GAP = 3.0
"""Smallest distance between the outlines of two things, in pixels."""
RENDER_MARGIN = 9.0
"""A drawn relation separates the two centres by at least this many pixels along its axis."""
CHECK_MARGIN = 4.0
"""A found relation counts from this separation on: less than in drawn scenes, more than a detector's error."""
EDGE_SHARPNESS = 2.5
"""Steepness of the antialiased outline, 1 / pixel."""


@dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y` is its centre in pixels from the top left corner."""

    size: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def words(self) -> tuple[str, str, str]:
        return (self.size, self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """Things, the background word, and the relation of thing 0 to each of the others, as in the caption."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...]
    background: str

    @property
    def caption(self) -> str:
        parts = [" ".join(self.things[0].words)]
        for relation, thing in zip(self.relations, self.things[1:], strict=True):
            parts.append(f"{relation} {' '.join(thing.words)}")
        head = parts[0] if len(parts) == 1 else f"{parts[0]} {' and '.join(parts[1:])}"
        return f"{head} on {self.background}"


@dataclass(frozen=True)
class Request:
    """The demands of a caption: the words of each thing, thing 0's relation to each of the others, the background."""

    things: tuple[tuple[str, str, str], ...]
    relations: tuple[str, ...]
    background: str


_THING = rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CLAUSE = rf"({'|'.join(RELATIONS)}) {_THING}"
_CAPTION = re.compile(rf"{_THING}(?: {_CLAUSE})?(?: and {_CLAUSE})? on ({'|'.join(BACKGROUNDS)})")


def parse_caption(caption: str) -> Request:
    """Parse a caption.

    Raises:
        ValueError: the text is not a caption of the shapes world.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(f"not a caption of the shapes world: {caption[:120]!r}")
    fields = match.groups()
    things = [fields[0:3]]
    relations = []
    for clause in (fields[3:7], fields[7:11]):
        if clause[0] is not None:
            relations.append(clause[0])
            things.append(clause[1:4])
    return Request(tuple(things), tuple(relations), fields[11])  # type: ignore[arg-type]


def holds(relation: str, first: Thing, second: Thing, margin: float) -> bool:
    """Whether `first` stands in `relation` to `second` by at least `margin` pixels."""
    separation = {
        "above": second.y - first.y,
        "below": first.y - second.y,
        "left of": second.x - first.x,
        "right of": first.x - second.x,
    }
    return separation[relation] >= margin


def obeys(request: Request, found: Sequence[Thing], background: str) -> bool:
    """Whether the found things and background are exactly those requested, under some assignment of things."""
    if len(found) != len(request.things) or background != request.background:
        return False
    return any(_assignment_obeys(request, order) for order in itertools.permutations(found))


def _assignment_obeys(request: Request, found: Sequence[Thing]) -> bool:
    if any(thing.words != asked for thing, asked in zip(found, request.things, strict=True)):
        return False
    others = zip(request.relations, found[1:], strict=True)
    return all(holds(relation, found[0], other, CHECK_MARGIN) for relation, other in others)


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene: 1 to 3 things, every attribute uniform, positions uniform among those without contact."""
    count = rng.randint(1, MAX_THINGS)
    while True:
        things: list[Thing] = []
        for _ in range(count):
            size = rng.choice(list(SIZES))
            reach = SIZES[size] + EDGE_MARGIN
            thing = Thing(
                size,
                rng.choice(list(COLOURS)),
                rng.choice(SHAPES),
                rng.uniform(reach, CANVAS - reach),
                rng.uniform(reach, CANVAS - reach),
            )
            things.append(thing)
        scene = _describe(things, rng)
        if scene is not None:
            return scene


def sample_grid_scene(rng: random.Random) -> Scene:
    """Draw a scene whose things are in different cells of a 2 x 2 grid, as the generator learns and is asked for.

    The scorers learn from `sample_scene`, with things anywhere, so they can judge more than the generator can draw.
    """
    while True:
        things = []
        for cell in rng.sample(range(4), rng.randint(1, MAX_THINGS)):
            size, colour, shape = rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)
            x, y = _place_in_cell(cell % 2, size, rng), _place_in_cell(cell // 2, size, rng)
            things.append(Thing(size, colour, shape, x, y))
        scene = _describe(things, rng)
        if scene is not None:
            return scene


def _place_in_cell(index: int, size: str, rng: random.Random) -> float:
    """One coordinate of a centre in the cell's row or column, with the whole thing inside the image."""
    middle, reach = (index + 0.5) * CELL, SIZES[size] + EDGE_MARGIN
    return rng.uniform(max(reach, middle - CELL_JITTER), min(CANVAS - reach, middle + CELL_JITTER))


def sample_grid_scenes(count: int, seed: int) -> list[Scene]:
    """`count` grid scenes; the result depends only on `seed` and `count`."""
    rng = random.Random(seed)
    return [sample_grid_scene(rng) for _ in range(count)]


def _describe(things: Sequence[Thing], rng: random.Random) -> Scene | None:
    """Name the scene's relations, or None if things touch or no relation is clear."""
    for first, second in itertools.combinations(things, 2):
        distance = float(np.hypot(first.x - second.x, first.y - second.y))
        if distance < SIZES[first.size] + SIZES[second.size] + GAP:
            return None
    relations = []
    for other in things[1:]:
        clear = [relation for relation in RELATIONS if holds(relation, things[0], other, RENDER_MARGIN)]
        if not clear:
            return None
        relations.append(rng.choice(clear))
    return Scene(tuple(things), tuple(relations), rng.choice(list(BACKGROUNDS)))


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes; the result depends only on `seed` and `count`."""
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def render(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw a scene as float32 [H, W, 3] in [0, 1]; `rng` draws grey level and small jitters of radius and colour."""
    low, high = BACKGROUNDS[scene.background]
    image = np.full((CANVAS, CANVAS, 3), rng.uniform(low, high), dtype=np.float32)
    for thing in scene.things:
        colour = np.asarray(COLOURS[thing.colour], dtype=np.float32) / np.float32(255)
        colour = np.clip(colour + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3).astype(np.float32), 0, 1)
        radius = SIZES[thing.size] + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)
        cover = coverage(thing.shape, thing.x, thing.y, radius)[..., None]
        image = image * (1 - cover) + colour * cover
    return image


def coverage(shape: str, x: float, y: float, radius: float) -> npt.NDArray[np.float32]:
    """Fraction of each pixel that a shape covers, float32 [H, W] in [0, 1]."""
    grid_y, grid_x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) + 0.5
    dx, dy = grid_x - x, grid_y - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.88
    else:
        distance = np.maximum(np.abs(dx) * 0.894 - (dy - 0.15 * radius) * 0.447, dy - 0.15 * radius) - radius * 0.62
    cover_HW = 1 / (1 + np.exp(np.clip(distance * EDGE_SHARPNESS, -30, 30)))
    return np.asarray(cover_HW, np.float32)


def render_scenes(scenes: Sequence[Scene], seed: int) -> npt.NDArray[np.uint8]:
    """Draw scenes as uint8 [B, H, W, 3]; the result depends only on the scenes and `seed`."""
    rng = np.random.default_rng(seed)
    images = [np.round(render(scene, rng) * 255).astype(np.uint8) for scene in scenes]
    return np.stack(images)
