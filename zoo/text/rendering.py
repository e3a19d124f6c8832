"""Renderer of the text world: one word in one of three fonts, which the caption leaves open.

The fonts are inside two packages, so every machine draws the same letters: Aileron of Pillow, and OpenCV's upright and
slanted faces (OpenCV 5 draws Rubik for the names of its former Hershey fonts). Every letter has a cell of `PITCH`
pixels. The caption names one of three rows. The word is anywhere in the row, in steps of `STEP_X` and `STEP_Y` pixels,
with a small jitter on top.

They decide how hard few denoising steps are: with words that were not moved, 4 drew them as well as 28.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from zoo.text.captions import PLACES, Request, sample_request
from zoo.world.scenes import BACKGROUNDS, CANVAS, COLOUR_JITTER, COLOURS

SUPERSAMPLING = 4
PITCH = 12
"""Width of a letter's cell, in pixels."""
LEFT = 2
"""Left edge of a word that is not moved, in pixels; five letters leave as much on the right."""
LETTER_HEIGHT = 16
"""Height of a letter's cell, in pixels."""
ROW_CENTRES = dict(zip(PLACES, (16, 32, 48), strict=True))
"""Each place maps to the y of the letters' middle, in pixels."""
STEP_X, STEP_Y = 8, 4
"""A word is moved right by a multiple of `STEP_X` as far as there is room, and by -1, 0 or 1 times `STEP_Y` down."""
JITTER_X, JITTER_Y = 0.5, 1.5
"""Largest further offset, in pixels."""

Array = npt.NDArray[np.float32]
_WIDE, _HIGH = PITCH * SUPERSAMPLING, LETTER_HEIGHT * SUPERSAMPLING


@dataclass(frozen=True)
class Layout:
    """What a caption leaves open: the font, the left edge of the first cell, and the offset from the row's middle."""

    font: str
    left: float
    dy: float


def _aileron(letter: str) -> npt.NDArray[np.uint8]:
    """A letter of Pillow's own font, a little bolder than drawn there."""
    image = Image.new("L", (_WIDE, _HIGH), 0)
    font = ImageFont.load_default(16 * SUPERSAMPLING)
    draw, stroke = ImageDraw.Draw(image), 2
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=font, stroke_width=stroke)
    corner = ((_WIDE - (right - left)) / 2 - left, (_HIGH - (bottom - top)) / 2 - top)
    draw.text(corner, letter, fill=255, font=font, stroke_width=stroke)
    return np.asarray(image, np.uint8)


def _opencv(letter: str, face: int) -> npt.NDArray[np.uint8]:
    image = np.zeros((_HIGH, _WIDE), np.uint8)
    scale, thickness = 0.55 * SUPERSAMPLING, 6
    (width, height), _ = cv2.getTextSize(letter, face, scale, thickness)
    corner = ((_WIDE - width) // 2, (_HIGH + height) // 2)
    cv2.putText(image, letter, corner, face, scale, 255, thickness, cv2.LINE_AA)
    return image


FONTS: dict[str, Callable[[str], npt.NDArray[np.uint8]]] = {
    "aileron": _aileron,
    "upright": lambda letter: _opencv(letter, cv2.FONT_HERSHEY_DUPLEX),
    "slanted": lambda letter: _opencv(letter, cv2.FONT_HERSHEY_SCRIPT_COMPLEX),
}
"""Each draws a letter, uint8 [64, 48], into the middle of a cell that is enlarged by `SUPERSAMPLING`."""


@cache
def _glyph(font: str, letter: str) -> npt.NDArray[np.uint8]:
    return FONTS[font](letter)


def sample_layout(letters: int, rng: np.random.Generator, moved: bool = True) -> Layout:
    """Draw the layout of a word; one that is not `moved` is at the left of the row's middle, but for the jitter."""
    room = CANVAS - 2 * LEFT - PITCH * letters
    right, down = (rng.integers(room // STEP_X + 1), rng.integers(-1, 2)) if moved else (0, 0)
    left = LEFT + STEP_X * right + rng.uniform(-JITTER_X, JITTER_X)
    return Layout(str(rng.choice(list(FONTS))), float(left), float(STEP_Y * down + rng.uniform(-JITTER_Y, JITTER_Y)))


def letter_centres(word: str, place: str, layout: Layout) -> list[tuple[float, float]]:
    """Middle (x, y) of each letter's cell, in pixels from the top left corner."""
    return [(layout.left + PITCH * (index + 0.5), ROW_CENTRES[place] + layout.dy) for index in range(len(word))]


def letter_cover(letter: str, font: str, x: float, y: float) -> Array:
    """Fraction of each pixel that a letter with its middle at (x, y) covers, float32 [H, W] in [0, 1]."""
    side = CANVAS * SUPERSAMPLING
    left, top = round(x * SUPERSAMPLING - _WIDE / 2), round(y * SUPERSAMPLING - _HIGH / 2)
    canvas = np.zeros((side, side), np.uint8)
    glyph = _glyph(font, letter)[max(0, -top) : max(0, side - top), max(0, -left) : max(0, side - left)]
    row, column = max(0, top), max(0, left)
    canvas[row : row + glyph.shape[0], column : column + glyph.shape[1]] = glyph
    return _shrink(canvas)


def _shrink(canvas: npt.NDArray[np.uint8]) -> Array:
    smaller = cv2.resize(canvas, (CANVAS, CANVAS), interpolation=cv2.INTER_AREA)
    return np.asarray(smaller, np.float32) / np.float32(255)


def word_cover(word: str, place: str, layout: Layout) -> Array:
    """Coverage of all letters, float32 [H, W] in [0, 1]; cells do not overlap."""
    side = CANVAS * SUPERSAMPLING
    canvas = np.zeros((side, side), np.uint8)
    centres = letter_centres(word, place, layout)
    left = round(centres[0][0] * SUPERSAMPLING - _WIDE / 2)
    top = round(centres[0][1] * SUPERSAMPLING - _HIGH / 2)
    for index, letter in enumerate(word):
        column = left + index * _WIDE
        canvas[top : top + _HIGH, column : column + _WIDE] = _glyph(layout.font, letter)
    return _shrink(canvas)


def render(request: Request, rng: np.random.Generator, moved: bool = True) -> Array:
    """Draw what a caption asks for, float32 [H, W, 3] in [0, 1]; `rng` draws layout, grey level and colour jitter."""
    layout = sample_layout(len(request.word), rng, moved)
    cover = word_cover(request.word, request.place, layout)[..., None]
    level = np.float32(rng.uniform(*BACKGROUNDS[request.background]))
    image: Array = level * (1 - cover) + paint(request.colour, rng) * cover
    return image


def paint(colour: str, rng: np.random.Generator) -> Array:
    """A colour with a small jitter, float32 [3] in [0, 1]."""
    exact = np.asarray(COLOURS[colour], np.float32) / np.float32(255)
    jittered: Array = np.clip(exact + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3).astype(np.float32), 0, 1)
    return jittered


def render_requests(requests: Sequence[Request], seed: int, moved: bool = True) -> npt.NDArray[np.uint8]:
    """Draw requests as uint8 [B, H, W, 3]; the result depends only on the arguments."""
    rng = np.random.default_rng(seed)
    return np.stack([np.round(render(request, rng, moved) * 255).astype(np.uint8) for request in requests])


def render_pages(count: int, seed: int) -> npt.NDArray[np.uint8]:
    """Pictures for an autoencoder, uint8 [B, H, W, 3]: half have one word, half have one in each place."""
    words, rng = random.Random(f"pages {seed}"), np.random.default_rng([seed, 1])
    pages = []
    for index in range(count):
        requests = [sample_request(words)] if index % 2 else [replace(sample_request(words), place=at) for at in PLACES]
        page = np.full((CANVAS, CANVAS, 3), rng.uniform(*BACKGROUNDS[requests[0].background]), np.float32)
        for request in requests:
            layout = sample_layout(len(request.word), rng)
            cover = word_cover(request.word, request.place, layout)[..., None]
            page = page * (1 - cover) + paint(request.colour, rng) * cover
        pages.append(np.round(page * 255).astype(np.uint8))
    return np.stack(pages)
