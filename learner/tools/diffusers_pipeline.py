"""Any diffusers text-to-image pipeline, sampled with one generator per image."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin

from common import seeding
from common.backbones.diffusers_backbone import DiffusersBackbone
from common.backbones.files.pipeline_files import PipelineFiles, read_index, require_parts_alone
from common.backbones.flux1 import Flux1
from common.backbones.flux2 import Flux2
from common.backbones.pipeline_loading import (
    ignored_option,
    load_pipeline,
    model_kind,
    pipeline_kind,
    require_parts,
)
from common.backbones.sd3 import StableDiffusion3
from common.errors import ConfigError, ModelError, one_line
from common.types import ByteArray, Prompt

logger = logging.getLogger(__name__)

FAMILIES: tuple[type[DiffusersBackbone[Any]], ...] = (StableDiffusion3, Flux1, Flux2)
"""The families whose files are checked by more than what any pipeline needs."""
OURS = ("prompt", "num_images_per_prompt", "generator", "output_type")
"""`pictures` sets these arguments of a pipeline's call itself."""


class PipelinePictures:
    """Samples a pipeline with `options`: keyword arguments of its call."""

    def __init__(self, path: Path, options: Mapping[str, Any], device: str, dtype: torch.dtype) -> None:
        """Load the pipeline.

        Raises:
            ModelError: the pipeline cannot be loaded, or a part that it needs is left out.
            ConfigError: its call does not have such an argument, or `pictures` sets it.
        """
        self._path = path
        self._pipeline = _load(path, dtype).to(device)
        known = [name for name in inspect.signature(self._pipeline.__call__).parameters if name not in OURS]
        for name in options:
            if name not in known:
                raise ConfigError(f"--call {name}: {type(self._pipeline).__name__} takes {', '.join(known)}")
        self._pipeline.set_progress_bar_config(disable=True)
        self._options = dict(options)

    def pictures(self, prompt: Prompt, seed: int, count: int) -> ByteArray:
        """uint8 [count, H, W, 3]; an image's noise is a function of (seed, the prompt's index, the image's number).

        Raises:
            ModelError: the pipeline cannot sample so.
        """
        generators = []
        for sample in range(count):
            key = seeding.generator_seed(seed=seed, purpose="diffusers", prompt=prompt.index, sample=sample)
            generators.append(torch.Generator("cpu").manual_seed(key))
        try:
            images_GHWC = self._pipeline(
                prompt=prompt.text,
                num_images_per_prompt=count,
                generator=generators,
                output_type="np",
                **self._options,
            ).images
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a pipeline raises a different class for each thing that it cannot do
            kind = type(self._pipeline).__name__
            raise ModelError(
                f"the {kind} at {self._path} cannot sample from a prompt with these --call options: {one_line(error)}"
            ) from error
        pixels_GHWC: ByteArray = (np.asarray(images_GHWC, np.float32) * 255).round().astype(np.uint8)
        return pixels_GHWC


def _load(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline of any class; refuse what a backbone refuses."""
    files = read_index(path, path)
    kind = pipeline_kind(files)
    require_parts(files, kind, (*kind._optional_components, *StableDiffusion3.optional_parts))
    taken = inspect.signature(kind.__init__).parameters
    files = dataclasses.replace(files, parts=tuple(part for part in files.parts if part in taken))
    require_parts_alone(files)
    files.require_usable_weights()
    for family in FAMILIES:
        if files.kind in family.kinds:
            family.check_files(files)
    _warn_of_ignored_options(files)
    return load_pipeline(files, kind, dtype)


def _warn_of_ignored_options(files: PipelineFiles) -> None:
    """Other families are published with options that diffusers has dropped, so these are no error here."""
    for part in files.parts:
        kind = model_kind(files, part)
        if kind and issubclass(kind, ModelMixin) and (reason := ignored_option(files, part, kind)):
            logger.warning("the pipeline at %s: %s", files.path, reason)
