"""Picture of a group: its samples side by side in one small file, for the live page."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image

from common.kept_groups import GroupPicture
from common.types import ByteArray, FloatArray

LARGEST_SIDE = 256
"""Pixels of a sample's longer side. Larger samples are scaled down by a whole factor, which is fast."""
LARGEST_LOSSLESS = 64
"""Samples up to this many pixels a side are a PNG: JPEG would blur what they show. Larger ones are a JPEG."""
JPEG_QUALITY = 85
WIDEST = 60_000
"""Pixels of a strip: a JPEG has at most 65 535."""


def group_picture(prompt: str, images_GHWC: ByteArray, rewards_G: Mapping[str, FloatArray]) -> GroupPicture:
    """The picture of a group's images, uint8 [G, H, W, 3]."""
    count, height, width, _ = images_GHWC.shape
    factor = max(-(-max(height, width) // LARGEST_SIDE), -(-width * count // WIDEST))
    tiles = [Image.fromarray(image_HWC).reduce(factor) for image_HWC in images_GHWC]
    strip = Image.new("RGB", (tiles[0].width * count, tiles[0].height))
    for place, tile in enumerate(tiles):
        strip.paste(tile, (place * tile.width, 0))
    content = io.BytesIO()
    if max(height, width) <= LARGEST_LOSSLESS:
        strip.save(content, "png")
        return GroupPicture(prompt, content.getvalue(), ".png", rewards_G)
    strip.save(content, "jpeg", quality=JPEG_QUALITY)
    return GroupPicture(prompt, content.getvalue(), ".jpg", rewards_G)
