"""LoRA file of a run: the student's stack of adapters as one, in the format of its model family."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from common.backbones.adapters import stacked_state
from common.backbones.base import Backbone
from common.types import Network

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The LoRA file has this name in diffusers' format."""
LORA_PREFIX = "transformer."
"""A LoRA file of diffusers has this prefix before a transformer's module paths."""
ABOUT_LORA = "about.json"
"""This file beside it contains {"base": fingerprint of the frozen model that the LoRA belongs to}."""


def student_lora(backbone: Backbone) -> dict[str, Tensor]:
    """The student's stack of adapters as one: module path.lora_A.weight, .lora_B.weight -> float32, unscaled."""
    bank = backbone.adapters
    return stacked_state([bank.state(name) for name in bank.stack(Network.STUDENT)])


def write_lora(backbone: Backbone, directory: Path) -> None:
    """Write the student as one LoRA in diffusers' format; a stack becomes one LoRA of its total rank."""
    directory.mkdir(parents=True, exist_ok=True)
    backbone.save_lora(directory, student_lora(backbone), backbone.adapters.scale)
    (directory / ABOUT_LORA).write_text(json.dumps({"base": backbone.base_fingerprint()}))
