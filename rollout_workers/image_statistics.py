"""Statistics of the decoded images of one group: what reward hacking changes and a reward may not see.

They are computed on images that are scored anyway. `learner/driver/watchdog.py` tests how far they drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from common.rank_agreement import AGREEMENT, rank_agreement
from common.types import FloatArray

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""
LEAST = 1e-6
"""Added before a logarithm: the value of an image without any content."""
COARSE = 16
"""Images are compared with each other at this height and width, where noise averages out."""
EQUAL = 0.02
"""Two images whose coarse versions differ by less than this root mean square are duplicates; the full range is 1."""
LOWEST_GRID_FREQUENCY = 1 / 16
"""Cycles per pixel: a grid has periods of at most 16 pixels. Objects and their layout have lower frequencies."""
NEIGHBOURS = 2
"""Frequencies on each side that a grid's peak is compared with."""


def with_agreement(statistics: Mapping[str, float], rewards_G: Mapping[str, FloatArray]) -> dict[str, float]:
    """A group's `image_statistics`, and the agreement of its rewards with each other, if they have an order."""
    agreement = rank_agreement(list(itertools.combinations(rewards_G.values(), 2)))
    return dict(statistics) if agreement is None else {**statistics, AGREEMENT: agreement}


def image_statistics(images_GHWC: Tensor) -> dict[str, float]:
    """Statistics of G images, uint8 [G, H, W, 3]; H and W are at least 3.

    sharpness: log2 of the root mean square of the luminance's Laplacian (4 neighbours), mean over the images.
    saturation: log2 of the mean over pixels of the largest minus the smallest of the three channels.
    clipping: share of channel values that are 0 or 255.
    grid: see `grid_prominence`.
    difference: log2 of the mean root mean square difference of two images at 16 x 16; needs G >= 2.
    duplicates: share of pairs that are closer than `EQUAL`; needs G >= 2.
    """
    images_GCHW = images_GHWC.permute(0, 3, 1, 2).float() / 255
    luminance_GHW = torch.einsum("gchw,c->ghw", images_GCHW, images_GCHW.new_tensor(LUMA))
    statistics = {
        "sharpness": float((laplacian(luminance_GHW).square().mean((1, 2)).sqrt() + LEAST).log2().mean()),
        "saturation": float(((images_GCHW.amax(1) - images_GCHW.amin(1)).mean() + LEAST).log2()),
        "clipping": float(((images_GHWC == 0) | (images_GHWC == 255)).float().mean()),
        "grid": grid_prominence(luminance_GHW),
    }
    return statistics | (_pairs(images_GCHW) if len(images_GCHW) > 1 else {})


def laplacian(luminance_GHW: Tensor) -> Tensor:
    """Sum of the four neighbours minus four times the pixel, of every pixel that has them: [G, H - 2, W - 2]."""
    inner = luminance_GHW[:, 1:-1, 1:-1]
    vertical = luminance_GHW[:, :-2, 1:-1] + luminance_GHW[:, 2:, 1:-1]
    horizontal = luminance_GHW[:, 1:-1, :-2] + luminance_GHW[:, 1:-1, 2:]
    return vertical + horizontal - 4 * inner


def grid_prominence(luminance_GHW: Tensor) -> float:
    """Height of the spectrum's highest narrow peak above its neighbours, in powers of ten; 0 without any peak.

    The power spectrum is the mean over the images, because a periodic pattern has the same frequency in all of them. A
    peak must stand out along both axes: edges that run along an axis raise a whole line of frequencies, a grid one
    place on it. Frequencies whose larger component is below `LOWEST_GRID_FREQUENCY` are left out.
    """
    height, width = luminance_GHW.shape[1:]
    centred = luminance_GHW - luminance_GHW.mean((1, 2), keepdim=True)
    power_hw = torch.fft.fft2(centred).abs().square().mean(0) / (height * width)
    level_hw = (power_hw + LEAST).log10()
    above_hw = torch.minimum(_above_neighbours(level_hw, 0), _above_neighbours(level_hw, 1))
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    allowed = torch.maximum(rows[:, None], columns[None, :]) >= LOWEST_GRID_FREQUENCY
    return max(0.0, float(above_hw[allowed.to(above_hw.device)].max()))


def _above_neighbours(level_hw: Tensor, axis: int) -> Tensor:
    """Each value minus the median of its neighbours along an axis; a spectrum is periodic."""
    shifts = [shift for shift in range(-NEIGHBOURS, NEIGHBOURS + 1) if shift != 0]
    neighbours = torch.stack([level_hw.roll(shift, axis) for shift in shifts]).sort(dim=0).values
    return level_hw - neighbours[NEIGHBOURS - 1 : NEIGHBOURS + 1].mean(0)


def _pairs(images_GCHW: Tensor) -> dict[str, float]:
    coarse = functional.adaptive_avg_pool2d(images_GCHW, COARSE).flatten(1)
    first, second = torch.triu_indices(len(coarse), len(coarse), offset=1)
    distances = (coarse[first] - coarse[second]).square().mean(1).sqrt()
    return {
        "difference": float((distances.mean() + LEAST).log2()),
        "duplicates": float((distances < EQUAL).float().mean()),
    }
