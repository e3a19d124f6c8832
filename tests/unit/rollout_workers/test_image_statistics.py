"""Image statistics against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rollout_workers.image_statistics import LEAST, grid_prominence, image_statistics, laplacian

SIDE = 32


def flat(*colours: tuple[int, int, int], side: int = SIDE) -> torch.Tensor:
    """One image per colour, uint8 [G, side, side, 3]."""
    return torch.tensor(colours, dtype=torch.uint8)[:, None, None, :].expand(-1, side, side, -1)


def stripes(amplitude: float, period: int, images: int = 4) -> torch.Tensor:
    """Noise with a wave of this amplitude along the width, [G, H, W]; the noise has a standard deviation of 0.02."""
    noise = torch.randn(images, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0))
    return 0.02 * noise + amplitude * torch.cos(2 * math.pi * torch.arange(2 * SIDE) / period)


def test_the_laplacian_of_one_bright_pixel() -> None:
    image = torch.zeros(1, 5, 5)
    image[0, 2, 2] = 1
    assert laplacian(image).tolist() == [[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]


def test_sharpness_is_a_logarithm_and_a_mean_over_images() -> None:
    """A checkerboard of 0 and 1 has a Laplacian of 4 everywhere, one of half the contrast has 2."""
    board = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2
    images = torch.stack([board * 255, board * 127 + 64]).to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
    expected = (math.log2(4) + math.log2(4 * 127 / 255)) / 2
    assert image_statistics(images)["sharpness"] == pytest.approx(expected, abs=1e-4)


def test_saturation_and_clipping_of_flat_colours() -> None:
    found = image_statistics(flat((255, 0, 51), (51, 51, 51)))
    assert found["saturation"] == pytest.approx(math.log2((1 + 0) / 2 + LEAST))
    assert found["clipping"] == pytest.approx(2 / 6)
    assert image_statistics(flat((100, 100, 100)))["clipping"] == 0


def test_pairs_of_a_group() -> None:
    """Three greys at 0.2, 0.2 and 0.6: distances 0, 0.4 and 0.4, one of three pairs is equal."""
    found = image_statistics(flat((51, 51, 51), (51, 51, 51), (153, 153, 153)))
    assert found["difference"] == pytest.approx(math.log2(0.8 / 3 + LEAST))
    assert found["duplicates"] == pytest.approx(1 / 3)


def test_one_image_has_no_pairs() -> None:
    assert set(image_statistics(flat((1, 2, 3)))) == {"sharpness", "saturation", "clipping", "grid"}


def test_an_empty_image_has_finite_statistics() -> None:
    found = image_statistics(flat((0, 0, 0), (0, 0, 0)))
    assert all(map(math.isfinite, found.values()))
    assert found["grid"] == 0


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_a_faint_grid_stands_out(period: int) -> None:
    """Amplitude 0.02 in noise of 0.02: its power is N / 4 times that of the noise, N = 4096 pixels (at period 2: N)."""
    without, faint = grid_prominence(stripes(0.0, period)), grid_prominence(stripes(0.02, period))
    expected = math.log10(4096 / 4 if period > 2 else 4096)
    assert without < 0.8
    assert faint == pytest.approx(expected, abs=0.4)


def test_a_long_wave_and_an_edge_are_no_grid() -> None:
    """Periods beyond 16 pixels belong to the picture; an edge raises a whole line of frequencies."""
    edge = stripes(0.0, 2)
    edge[:, :, 23:] += 0.5
    assert grid_prominence(stripes(0.3, 32)) < 0.8
    assert grid_prominence(edge) < 1.2
