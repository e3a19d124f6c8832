"""Images on disk: single ones, and grids of several prompts. Shape suffixes: see `common/types.py`."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from common.types import ByteArray
from common.whole_files import write_whole

SMALLEST_SIDE, LARGEST_SIDE = 128, 256
"""A captioned grid scales images to a width in this range of pixels: small ones stay visible, the file stays small."""
SMALLEST_WIDTH = 520
"""A grid is at least this wide, so that a prompt of usual length is readable above two small images."""
CAPTION_HEIGHT = 20
CAPTION_MARGIN = 4
FONT_SIZE = 12
GAP = 4


def save_png(image_HWC: ByteArray, path: Path) -> None:
    """Write uint8 [H, W, 3] as PNG, whole or not at all."""
    content = io.BytesIO()
    Image.fromarray(image_HWC).save(content, "png")
    write_whole(path, content.getvalue())


def captioned_grid(rows: Sequence[tuple[str, ByteArray]]) -> Image.Image:
    """One row per prompt: its text above, its images uint8 [G, H, W, C] side by side."""
    pictures = [[_at_a_glance(image) for image in images_GHWC] for _, images_GHWC in rows]
    width = max(SMALLEST_WIDTH, *(sum(picture.width + GAP for picture in row) for row in pictures))
    height = sum(CAPTION_HEIGHT + row[0].height + GAP for row in pictures)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for (text, _), row in zip(rows, pictures, strict=True):
        draw.text(
            (CAPTION_MARGIN, top + CAPTION_MARGIN), _shortened(draw, text, width), fill="black", font_size=FONT_SIZE
        )
        left, top = 0, top + CAPTION_HEIGHT
        for picture in row:
            canvas.paste(picture, (left, top))
            left += picture.width + GAP
        top += row[0].height + GAP
    return canvas


def _at_a_glance(image_HWC: ByteArray) -> Image.Image:
    picture = Image.fromarray(image_HWC)
    width = min(max(picture.width, SMALLEST_SIDE), LARGEST_SIDE)
    size = (width, round(picture.height * width / picture.width))
    filter_ = Image.Resampling.NEAREST if width >= picture.width else Image.Resampling.LANCZOS
    return picture if size == picture.size else picture.resize(size, filter_)


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text on one line, cut at the end of the row."""
    room = width - 2 * CAPTION_MARGIN
    # No letter is narrower than two pixels, so the width of a very long prompt is not measured.
    text = " ".join(text.split())[: width // 2]
    if draw.textlength(text, font_size=FONT_SIZE) <= room:
        return text
    widths = [draw.textlength(f"{text[:end]}…", font_size=FONT_SIZE) for end in range(len(text))]
    fits = bisect_right(widths, room)
    return f"{text[: fits - 1]}…"
