"""Pixels in [0, 1] -> what a vision tower was trained on: torch alone, so that a gradient flows back to the image.

Published recipes resize either a float tensor in one go (torchvision on tensors) or an 8-bit picture (Pillow). Pillow
filters the width, rounds and clips to 8 bits, then does the same to the height: `eight_bit` repeats that exactly, and
its gradient passes straight through the rounding, which has none.

Shape suffixes: B images, C = 3 channels, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

# Mean and standard deviation of CLIP's training images (Radford et al. 2021, arXiv 2103.00020, released code).
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

WHITE = 255


@dataclass(frozen=True)
class ImageRecipe:
    """A picture made square, then OpenAI's mean and standard deviation.

    Attributes:
        size: side of the square the model sees.
        eight_bit: resize as Pillow resizes 8-bit pictures; else as torchvision resizes float tensors, overshoot kept.
        whole: the longer side to `size` and black bars beside it; else the shorter side and the centre of the longer.
        resample: the antialiased filter.
        crop_offset: an odd margin, halved -> whole pixels. `round` (to even) is torchvision's, `int` transformers'.
    """

    size: int
    eight_bit: bool
    whole: bool = False
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    crop_offset: Callable[[float], int] = round

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised."""
        pixels_BCHW = self.square(images_BCHW)
        mean, std = (pixels_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
        return (pixels_BCHW - mean) / std

    def square(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] -> [B, 3, size, size]. A picture of that size is left alone."""
        return self._with_bars(images_BCHW) if self.whole else self._centre(images_BCHW)

    def _centre(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        height, width = images_BCHW.shape[-2:]
        short = min(height, width)
        # All published recipes cut the long side down to whole pixels.
        height, width = int(self.size * height / short), int(self.size * width / short)
        resized_BCHW = self._resize(images_BCHW, height, width)
        top, left = self.crop_offset((height - self.size) / 2), self.crop_offset((width - self.size) / 2)
        return resized_BCHW[..., top : top + self.size, left : left + self.size]

    def _with_bars(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        height, width = images_BCHW.shape[-2:]
        scale = self.size / max(height, width)
        # The short side is rounded, half to even; at least a line of the picture stays.
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        resized_BCHW = self._resize(images_BCHW, height, width)
        rows, columns = self.size - height, self.size - width
        return F.pad(resized_BCHW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _resize(self, images_BCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if not self.eight_bit:
            return self._filter(images_BCHW, height, width)
        # On the scale of 0 to 255, in float64 as Pillow's coefficients: where a sum lies close to the middle of two
        # grey levels both then round it alike, but for a pixel in 10 000, or 30 where the size doubles: Pillow's sums
        # have 22 bits.
        levels_BCHW = images_BCHW.double() * WHITE
        for size in ((images_BCHW.shape[-2], width), (height, width)):
            if size != tuple(levels_BCHW.shape[-2:]):
                levels_BCHW = _to_grey_levels(self._filter(levels_BCHW, *size))
        return (levels_BCHW / WHITE).to(images_BCHW.dtype)

    def _filter(self, images_BCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if (height, width) == tuple(images_BCHW.shape[-2:]):
            return images_BCHW
        return F.interpolate(images_BCHW, size=(height, width), mode=self.resample, align_corners=False, antialias=True)


def _to_grey_levels(levels: torch.Tensor) -> torch.Tensor:
    """Clip to [0, 255] and round half up; the gradient is that of the clipping."""
    clipped = levels.clamp(0.0, float(WHITE))
    return clipped + (torch.floor(clipped + 0.5) - clipped).detach()
