"""Compares the image preparation that a model directory asks for with the one that its scorer always applies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ModelError
from reward_servers.scorers.model_directory import read_settings
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD

FILE, NESTED_FILE, NESTED_KEY = "preprocessor_config.json", "processor_config.json", "image_processor"
"""transformers saves an image processor in a file of its own, or inside that of the whole processor."""
BICUBIC = 3
"""Pillow's number of this filter."""
TOLERANCE = 1e-4
"""Files hold rounded means and standard deviations."""


def clip_processor(size: int) -> dict[str, Any]:
    """The processor that every published CLIP has, for a vision tower of this image size."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    }


def require_processor(directory: Path, applied: Mapping[str, Any]) -> None:
    """Compare the image processor in `directory`, if there is one, with the settings that the scorer applies.

    Raises:
        ModelError: they differ, so the model was trained on images that are prepared in another way.
    """
    for file in (directory / FILE, directory / NESTED_FILE):
        if file.is_file():
            found = read_settings(file)
            inner = found if file.name == FILE else found.get(NESTED_KEY)
            require_settings(file, inner if isinstance(inner, dict) else {}, applied)


def require_settings(file: Path, found: Mapping[str, Any], applied: Mapping[str, Any]) -> None:
    """ModelError if one of the `applied` settings is in the file with another value."""
    for key, ours in applied.items():
        theirs = found.get(key)
        if theirs is not None and not _equal(_whole_size(key, theirs), ours):
            raise ModelError(
                f"{file}: {key} is {theirs}, but this scorer always applies {ours}: its scores would not be those of "
                "this model, so it needs a model that was trained with that value"
            )


def _whole_size(key: str, value: Any) -> Any:
    """Sizes as transformers reads a single number: the shorter side, or both sides of a crop."""
    if isinstance(value, int) and key == "size":
        return {"shortest_edge": value}
    if isinstance(value, int) and key == "crop_size":
        return {"height": value, "width": value}
    return value


def _equal(first: Any, second: Any) -> bool:
    """Equality with a tolerance for numbers, also inside lists and mappings."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, abs_tol=TOLERANCE)
    return bool(first == second)
