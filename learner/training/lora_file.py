"""LoRA file of a run: the student's stack of adapters as one, in the format of its model family.

An adapter's update is `scale` B A with scale = alpha / rank. diffusers keeps alpha in a file's metadata. Tools that
ignore or lose them take a scale of 1. So the scale is multiplied into B, and alpha equals the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from common.backbones.adapters import stacked_state
from common.backbones.base import Backbone
from common.types import Network
from common.whole_files import whole_files

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The LoRA file has this name in diffusers' format."""
LORA_PREFIX = "transformer."
"""A LoRA file of diffusers has this prefix before a transformer's module paths."""
ABOUT_LORA = "about.json"
"""This file beside it contains {"base": fingerprint of the frozen model that the LoRA belongs to, "scale": 1.0}."""
SCALE = 1.0
"""The scale of the files that are written."""


def student_lora(backbone: Backbone) -> dict[str, Tensor]:
    """The student's stack of adapters as one: module path.lora_A.weight, .lora_B.weight -> float32, unscaled."""
    bank = backbone.adapters
    return stacked_state([bank.state(name) for name in bank.stack(Network.STUDENT)])


def scaled_lora(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same update with a scale of 1: B times `scale`."""
    return {key: (scale * value if ".lora_B." in key else value).contiguous() for key, value in state.items()}


def write_lora(backbone: Backbone, directory: Path) -> None:
    """Write the student as one LoRA in diffusers' format; a stack becomes one LoRA of its total rank."""
    with whole_files(directory) as folder:
        backbone.save_lora(folder, scaled_lora(student_lora(backbone), backbone.adapters.scale), SCALE)
        (folder / ABOUT_LORA).write_text(json.dumps({"base": backbone.base_fingerprint(), "scale": SCALE}))


def written_scale(file: Path, about: Mapping[str, object], before: float) -> float:
    """The scale of a LoRA file: from the file beside it, from its metadata, or `before`, that of the run itself.

    Runs of earlier versions wrote their own scale, and only into the metadata.

    Raises:
        ValueError, TypeError, KeyError: one of them is damaged.
    """
    if "scale" in about:
        return float(str(about["scale"]))
    with safe_open(file, "pt") as header:
        metadata = json.loads((header.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if f"{LORA_PREFIX}lora_alpha" not in metadata:
        return before
    return float(metadata[f"{LORA_PREFIX}lora_alpha"]) / float(metadata[f"{LORA_PREFIX}r"])
