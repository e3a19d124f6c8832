"""Figures of a pipeline of the shapes world: gold of its samples and of its VAE's reconstructions of renders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from zoo.checker.parsing import GoldChecker
from zoo.world.scenes import render_scenes, sample_grid_scenes
from zoo.world.tokenizers import MAX_PHRASES

GUIDANCE = 4.0
MEASURED_PROMPTS = 384
SEED = 12_345


class Exam:
    """Held-out scenes and the checker that marks images of them."""

    def __init__(self, checker: GoldChecker, count: int = MEASURED_PROMPTS) -> None:
        scenes = sample_grid_scenes(count, SEED)
        self._checker = checker
        self.captions = [scene.caption for scene in scenes]
        self.renders = render_scenes(scenes, SEED)

    @classmethod
    def beside(cls, pipeline_dir: Path) -> Exam:
        """An exam with the checker that a full build has put beside the pipeline."""
        return cls(GoldChecker.load(pipeline_dir.parent / "checker"))

    def gold(self, images_BHWC: npt.NDArray[np.uint8]) -> float:
        """Fraction of the images, one per caption, that show what their caption says."""
        return float(self._checker.verdict(images_BHWC, self.captions).mean())


def to_pixels(images_BCHW: Tensor) -> npt.NDArray[np.uint8]:
    """A decoder's output in [-1, 1] -> uint8 [B, H, W, 3]."""
    pixels = ((images_BCHW / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def generate(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    steps: int,
    guidance: float,
    seed: int = 7,
    text_length: int = MAX_PHRASES,
    **options: Any,
) -> npt.NDArray[np.uint8]:
    """Images uint8 [B, H, W, 3] from diffusers' own sampling loop; `options` are the family's extra call arguments."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(captions), 64):
        output = pipeline(
            prompt=list(captions[start : start + 64]),
            num_inference_steps=steps,
            # The method's steps, evenly spaced before the shift; SD3's default ends in a step of almost no size.
            sigmas=[(steps - step) / steps for step in range(steps)],
            guidance_scale=guidance,
            generator=generator,
            max_sequence_length=text_length,
            output_type="np",
            **options,
        )
        parts.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)
