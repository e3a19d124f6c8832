"""Model families behind one protocol. A new family is one file; docs/backbones.md is the guide."""

from __future__ import annotations

from importlib import import_module

import torch

from common.backbones.base import Backbone
from common.config import LoraConfig
from common.config_backbones import BackboneConfig
from common.errors import ModelError

_FAMILIES = {
    "sd3": "common.backbones.sd3:StableDiffusion3",
    "flux2": "common.backbones.flux2:Flux2",
    "flux1": "common.backbones.flux1:Flux1",
}
"""Imported when they are asked for: each takes its pipeline's whole stack."""


def load_backbone(settings: BackboneConfig, lora: LoraConfig, device: torch.device) -> Backbone:
    """Load the family that the run file names: one of ours, or any class by its import path module:Class.

    Raises:
        ModelError: there is no such class; or see the family's own file.
    """
    path = _FAMILIES.get(settings.family, settings.family)
    module, _, name = path.partition(":")
    try:
        family = vars(import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise ModelError(f"backbone.family = {settings.family}: cannot import {name} from {module}: {error}") from error
    backbone: Backbone = family(settings, lora, device)
    return backbone
