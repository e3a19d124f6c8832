"""Image preparation against the libraries the published recipes use: Pillow, transformers' own processor, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.rewards.api import ByteArray
from reward_servers.scorers.pixels import ImageRecipe
from tests.helpers.tiny_rewards import random_images

SIDE = 32
# Up, down, flat, tall, the side itself, a margin of 3 (whose half torchvision rounds up and transformers down).
SIZES = [(32, 32), (64, 48), (37, 91), (20, 33), (16, 16), (32, 35), (301, 200), (31, 400), (400, 31), (2, 64)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def as_pixels(images_BHWC: ByteArray) -> torch.Tensor:
    return torch.tensor(images_BHWC).permute(0, 3, 1, 2).float() / 255


def assert_same_pictures(ours: torch.Tensor, theirs: torch.Tensor, grey_level: float) -> None:
    """Equal but for one grey level in 5 of 1000 pixels at most: ties, which exact doubling makes many of."""
    difference = (ours - theirs).abs() / grey_level
    assert float(difference.max()) <= 1.01
    assert float((difference > 0.01).float().mean()) <= 5e-3


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_eight_bit_pictures_are_resized_as_pillow_resizes_them(height: int, width: int) -> None:
    images = random_images(2, height, width)
    size = (int(SIDE * width / min(height, width)), int(SIDE * height / min(height, width)))
    left, top = (round((side - SIDE) / 2) for side in size)
    pictures = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    expected = as_pixels(np.stack(pictures)[:, top : top + SIDE, left : left + SIDE])
    assert_same_pictures(ImageRecipe(SIDE, eight_bit=True).square(as_pixels(images)), expected, 1 / 255)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_eight_bit_pictures_are_prepared_as_the_clip_processor_does(height: int, width: int) -> None:
    processor_module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processor_module.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    images = random_images(2, height, width, seed=1)
    expected = torch.tensor(np.stack(processor(list(images))["pixel_values"]))
    ours = ImageRecipe(SIDE, eight_bit=True, crop_offset=int)(as_pixels(images))
    assert_same_pictures(ours * STD, expected * STD, 1 / 255)


@pytest.mark.parametrize(("height", "width"), [(1, 32), (32, 1), (3, 96), (96, 3)])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_the_longest_pictures_are_resized_one_at_a_time_and_no_differently(
    height: int, width: int, eight_bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_pixels(random_images(3, height, width))
    recipe = ImageRecipe(SIDE, eight_bit)
    largest: list[int] = []
    interpolate = F.interpolate

    def noted(*inputs: object, **options: object) -> torch.Tensor:
        resized = interpolate(*inputs, **options)
        largest.append(resized.numel())
        return resized

    monkeypatch.setattr(F, "interpolate", noted)
    squares = recipe.square(images)
    assert max(largest) <= 3 * SIDE * SIDE * 32
    monkeypatch.setattr("reward_servers.scorers.pixels.LONG_ASPECT", 100)
    torch.testing.assert_close(squares, recipe.square(images), rtol=0, atol=0)


def keys(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic kernel, a = -0.5."""
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x).clamp(min=0.0)


@pytest.mark.parametrize(("resample", "kernel"), [("bicubic", keys), ("bilinear", triangle)])
def test_float_pictures_are_filtered_in_one_go(resample: str, kernel: object) -> None:
    """By hand: the kernel stretched by the scale, its weights normalised, rows then columns, nothing cut off."""
    image = torch.rand(1, 3, 16, 24, dtype=torch.float64)

    def weights(inputs: int, outputs: int) -> torch.Tensor:
        scale = inputs / outputs
        centres = (torch.arange(outputs, dtype=torch.float64)[:, None] + 0.5) * scale
        x = ((torch.arange(inputs, dtype=torch.float64)[None] + 0.5 - centres) / scale).abs()
        return kernel(x) / kernel(x).sum(dim=1, keepdim=True)

    expected = weights(16, 8) @ image @ weights(24, 12).T
    ours = ImageRecipe(8, eight_bit=False, resample=resample).square(image)
    torch.testing.assert_close(ours, expected[..., 2:10], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (64, 40, (0, 32, 6, 26)),  # the width, 20, leaves 12: 6 and 6
        (30, 64, (8, 23, 0, 32)),  # the height, 15, leaves 17: 8 and 9
        (32, 9, (0, 32, 11, 20)),
        (8, 4, (0, 32, 8, 24)),
        (2000, 3, (0, 32, 15, 16)),
    ],
)
def test_a_whole_picture_gets_black_bars(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = box
    image = torch.rand(1, 3, height, width)
    size = (bottom - top, right - left)
    expected = torch.zeros(1, 3, SIDE, SIDE)
    expected[..., top:bottom, left:right] = F.interpolate(
        image, size, mode="bicubic", align_corners=False, antialias=True
    )
    ours = ImageRecipe(SIDE, eight_bit=False, whole=True).square(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eight_bit", [True, False])
def test_a_picture_of_the_models_size_is_left_alone(eight_bit: bool) -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    torch.testing.assert_close(ImageRecipe(SIDE, eight_bit).square(images), images, rtol=0, atol=1e-7)


def test_overshoot_is_kept_in_float_and_cut_in_eight_bits() -> None:
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 30:] = 1.0
    assert float(ImageRecipe(SIDE, eight_bit=False).square(edge).max()) > 1.01
    assert float(ImageRecipe(SIDE, eight_bit=True).square(edge).max()) == 1.0


def test_the_gradient_passes_straight_through_the_rounding_but_not_through_the_clipping() -> None:
    weights = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def gradient(pixels: torch.Tensor, eight_bit: bool) -> torch.Tensor:
        pixels = pixels.clone().requires_grad_()
        (ImageRecipe(SIDE, eight_bit).square(pixels) * weights).sum().backward()
        assert pixels.grad is not None
        return pixels.grad

    soft = 0.3 + 0.4 * torch.rand(1, 3, 40, 44, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gradient(soft, True), gradient(soft, False), rtol=1e-4, atol=1e-5)
    hard = F.pad(torch.zeros(1, 3, 40, 22), (0, 22), value=1.0)
    assert float((gradient(hard, True) - gradient(hard, False)).abs().max()) > 0.1


def test_a_prepared_picture_is_normalised() -> None:
    pixels = torch.rand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(ImageRecipe(SIDE, eight_bit=False)(pixels), (pixels - MEAN) / STD)
