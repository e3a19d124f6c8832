"""Prepares pixels in [0, 1] for a vision tower, with torch alone, so that a gradient flows back to the image.

Published recipes resize either a float tensor in one pass (torchvision on tensors) or an 8-bit image (Pillow). Pillow
filters the width, rounds and clips to 8 bits, then does the same to the height: `eight_bit` repeats that exactly. Its
gradient passes straight through the rounding, which has no gradient.

Shape suffixes: B images, C = 3 channels, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images come from the released code (Radford et al. 2021,
arXiv 2103.00020)."""

WHITE = 255
LONG_ASPECT = 2
"""Images whose longer side exceeds this many times the shorter side are prepared one at a time."""


@dataclass(frozen=True)
class ImageRecipe:
    """Makes an image square, then applies OpenAI's mean and standard deviation.

    Attributes:
        size: side of the square that the model gets.
        eight_bit: resize as Pillow resizes 8-bit images; else as torchvision resizes float tensors, overshoot kept.
        whole: resize the longer side to `size` and add black bars; else resize the shorter side and crop the centre.
        resample: the antialiased filter.
        crop_offset: converts half of an odd margin to whole pixels: `round` (to even) in torchvision, `int` in
            transformers.
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
        """float32 [B, 3, H, W] -> [B, 3, size, size]. An image of that size is returned unchanged."""
        fit = self._with_bars if self.whole else self._centre
        height, width = images_BCHW.shape[-2:]
        if max(height, width) <= LONG_ASPECT * min(height, width):
            return fit(images_BCHW)
        # Enlarged to the model's size, a long image is mostly margin: one at a time, to save memory.
        return torch.cat([fit(image_CHW[None]) for image_CHW in images_BCHW])

    def _centre(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        height, width = images_BCHW.shape[-2:]
        short = min(height, width)
        # All published recipes round the long side down to whole pixels.
        height, width = int(self.size * height / short), int(self.size * width / short)
        top, left = self.crop_offset((height - self.size) / 2), self.crop_offset((width - self.size) / 2)
        return self._resize(images_BCHW, height, width, slice(top, top + self.size), slice(left, left + self.size))

    def _with_bars(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        height, width = images_BCHW.shape[-2:]
        scale = self.size / max(height, width)
        # The short side is rounded, half to even; at least one line of the image remains.
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        resized_BCHW = self._resize(images_BCHW, height, width, slice(None), slice(None))
        rows, columns = self.size - height, self.size - width
        return F.pad(resized_BCHW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _resize(self, images_BCHW: torch.Tensor, height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
        """Resize to `height` x `width`, keeping only `rows` and `columns`; each pass computes only its own."""
        if not self.eight_bit:
            # A copy, so that the view does not keep the margins in memory.
            return self._filter(images_BCHW, height, width)[..., rows, columns].contiguous()
        # On the scale 0 to 255, in float64 like Pillow's coefficients. Where a sum lies close to the middle of two grey
        # levels, both then round it alike, except for 1 pixel in 10 000, or 30 where the size doubles: Pillow's sums
        # have 22
        # bits.
        levels_BCHW = images_BCHW.double() * WHITE
        levels_BCHW = self._pass(levels_BCHW, (levels_BCHW.shape[-2], width), slice(None), columns)
        levels_BCHW = self._pass(levels_BCHW, (height, levels_BCHW.shape[-1]), rows, slice(None))
        return (levels_BCHW / WHITE).to(images_BCHW.dtype)

    def _pass(self, levels_BCHW: torch.Tensor, size: tuple[int, int], rows: slice, columns: slice) -> torch.Tensor:
        kept_BCHW = self._filter(levels_BCHW, *size)[..., rows, columns]
        return kept_BCHW if size == tuple(levels_BCHW.shape[-2:]) else _to_grey_levels(kept_BCHW.contiguous())

    def _filter(self, images_BCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if (height, width) == tuple(images_BCHW.shape[-2:]):
            return images_BCHW
        return F.interpolate(images_BCHW, size=(height, width), mode=self.resample, align_corners=False, antialias=True)


def _to_grey_levels(levels: torch.Tensor) -> torch.Tensor:
    """Clip to [0, 255] and round half up; the gradient is that of the clipping."""
    clipped = levels.clamp(0.0, float(WHITE))
    return clipped + (torch.floor(clipped + 0.5) - clipped).detach()
