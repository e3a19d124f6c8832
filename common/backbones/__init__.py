"""Model families behind one protocol. A new family is one file; docs/backbones.md explains how to add one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from common.backbones.files.pipeline_files import find_index
from common.backbones.files.sizes import ModelSizes
from common.config.backbones import BackboneConfig
from common.config.run import LoraConfig
from common.errors import ModelError
from common.project_files import import_own

if TYPE_CHECKING:
    import torch

    from common.backbones.base import Backbone

_FAMILIES = {
    "sd3": "common.backbones.sd3:StableDiffusion3",
    "flux2": "common.backbones.flux2:Flux2",
    "flux1": "common.backbones.flux1:Flux1",
}
"""Families are imported on demand, because each imports its pipeline's whole library stack."""


def model_sizes(settings: BackboneConfig, lora: LoraConfig) -> ModelSizes | None:
    """Sizes of the run file's model, without loading it; None for a custom family.

    Raises:
        ModelError: see `load_backbone`.
    """
    if settings.family not in _FAMILIES:
        return None
    sizes: ModelSizes = _family(settings).sizes(settings, lora)
    return sizes


def load_backbone(
    settings: BackboneConfig, lora: LoraConfig, device: torch.device, *, sharded: bool = False
) -> Backbone:
    """Load the family that the run file names: a built-in one, or any class by its import path module:Class.

    `sharded` shards its frozen base over the ranks of torch.distributed, see `common/backbones/device/sharding.py`.

    Raises:
        ModelError: there is no such class, or it cannot be sharded; see also the family's own file.
    """
    family, options = _family(settings), {"sharded": True} if sharded else {}
    if options.keys() - inspect.signature(family).parameters.keys():
        raise ModelError(f"backbone.family = {settings.family}: it takes no `sharded`: set learner.shard_base to false")
    backbone: Backbone = family(settings, lora, device, **options)
    return backbone


def _family(settings: BackboneConfig) -> Any:
    if settings.family in _FAMILIES:
        find_index(settings.path)  # before the import, which takes seconds
    path = _FAMILIES.get(settings.family, settings.family)
    module, _, name = path.partition(":")
    try:
        family = vars(import_own(module))[name]
    except (ImportError, KeyError) as error:
        raise ModelError(f"backbone.family = {settings.family}: cannot import {name} from {module}: {error}") from error
    return family
