"""The picture of a group: tiles of one size, exact where they are small."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rollout_workers.group_picture import LARGEST_SIDE, WIDEST, group_picture


def strip(images: np.ndarray) -> tuple[str, Image.Image]:
    picture = group_picture("a prompt", images, {})
    return picture.suffix, Image.open(io.BytesIO(picture.strip))


def test_small_samples_are_kept_to_the_bit() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    suffix, image = strip(images)
    assert suffix == ".png"
    assert np.array_equal(np.asarray(image), np.concatenate(list(images), axis=1))


@pytest.mark.parametrize(("count", "height", "width"), [(3, 512, 1024), (2, 300, 200), (300, 256, 256)])
def test_large_samples_are_scaled_into_tiles_of_one_size(count: int, height: int, width: int) -> None:
    images = np.zeros((count, height, width, 3), dtype=np.uint8)
    images[-1] = 255
    suffix, image = strip(images)
    assert suffix == ".jpg"
    assert image.width % count == 0
    tile = image.width // count
    assert max(tile, image.height) <= LARGEST_SIDE
    assert image.width <= WIDEST
    assert tile / image.height == pytest.approx(width / height, rel=0.02)
    shown = np.asarray(image.convert("L"))
    assert shown[:, : tile * (count - 1) - 8].max() < 20
    assert shown[:, tile * (count - 1) + 8 :].min() > 235
