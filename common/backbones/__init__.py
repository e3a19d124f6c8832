"""Model families behind one protocol. A new family is one file here and one line in `_FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.backbones.base import Backbone
from common.backbones.sd3 import StableDiffusion3
from common.config import BackboneConfig, LoraConfig

_FAMILIES: dict[str, Callable[[BackboneConfig, LoraConfig, torch.device], Backbone]] = {"sd3": StableDiffusion3}


def load_backbone(settings: BackboneConfig, lora: LoraConfig, device: torch.device) -> Backbone:
    """Load the family that the run file names.

    Raises:
        ModelError: see the family's own file.
    """
    return _FAMILIES[settings.family](settings, lora, device)
