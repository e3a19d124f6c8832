"""Weight files of one part of a pipeline: which of its copies is read, and whether that one is whole and usable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common import git_lfs
from common.weight_names import (
    MERGE_REMEDY,
    PLAIN,
    VARIANTS,
    adapter_weight,
    quantised_weight,
    variant_of,
    wrapper_prefix,
)

WEIGHT_FILES = "*.safetensors"
OWN_NAME = re.compile(r"(diffusion_pytorch_)?model([.-].*)?\.safetensors")
"""Names of the weights that diffusers or transformers reads; other files beside them are not theirs."""


def own_files(folder: Path) -> list[Path]:
    """The weight files of a part that its library may read, in any variant."""
    return sorted(file for file in folder.glob(WEIGHT_FILES) if OWN_NAME.fullmatch(file.name))


def read_files(folder: Path, variant: str) -> list[Path]:
    """The weight files of a part that are read: the variant's, if the part has it, else the plain ones."""
    read = _read_variant(folder, variant)
    return [file for file in own_files(folder) if variant_of(file.name) == read]


def fault(folder: Path, variant: str) -> str | None:
    """The first fault of the weights that are read: a missing shard, damage, a foreign type, a LoRA or a wrapper."""
    for index in _indices(folder, variant):
        if reason := _fault_of_index(folder, index):
            return reason
    names: list[str] = []
    for file in read_files(folder, variant):
        if reason := _fault_of_file(folder, file):
            return reason
        header, _ = read_header(file)
        if found := quantised_weight({key: entry["dtype"] for key, entry in header.items()}):
            return quantised_reason(folder.name, f"{file.name}: {found}")
        names += header
    if found := adapter_weight(names):
        return unmerged_reason(folder.name, found)
    prefix = wrapper_prefix(names)
    remedy = "save the model that is inside the wrapper, or rename the weights"
    return f"every weight of its {folder.name} has a training wrapper's prefix {prefix}: {remedy}" if prefix else None


def _fault_of_file(folder: Path, file: Path) -> str | None:
    name = f"{folder.name}/{file.name}"
    if not file.exists():
        return f"{name} is a link to a file that is not there: download or copy it again"
    if git_lfs.is_pointer(file):
        return f"{name} {git_lfs.REMEDY}"
    _, declared = read_header(file)
    if file.stat().st_size != declared:
        return f"{name} is damaged: {file.stat().st_size} bytes, not what its header says"
    return None


def _fault_of_index(folder: Path, index: Path) -> str | None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder.name}/{index.name} is damaged: {error!r}"
    missing = [shard for shard in shards if not (folder / shard).exists()]
    return f"there is no {folder.name}/{missing[0]} in it, which {index.name} names" if missing else None


def quantised_reason(part: str, found: str) -> str:
    return (
        f"its {part} is quantised ({found}), and only unquantised weights are supported: use the unquantised "
        "pipeline; less memory is needed with backbone.text_encoder_int8, backbone.idle_on_cpu or learner.shard_base"
    )


def unmerged_reason(part: str, found: str) -> str:
    return f"its {part} has an unmerged LoRA ({found}), and only merged weights are supported: {MERGE_REMEDY}"


def without_weights(folder: Path) -> str:
    """Why a part has no weights that can be read, and what it has instead."""
    reason = f"there is no {folder.name}/{WEIGHT_FILES} in it"
    copies = sorted({variant_of(file.name) for file in own_files(folder)} - {PLAIN})
    unnamed = sorted({file.name for file in folder.glob(WEIGHT_FILES)} - {file.name for file in own_files(folder)})
    others = sorted(file.name for kind in ("*.bin", "*.gguf", "*.pt") for file in folder.glob(kind))
    if usable := [variant for variant in copies if variant in VARIANTS]:
        return (
            f"{reason} but the variant {usable[0]}, which another part lacks: one variant must serve every part "
            "without a plain copy"
        )
    if copies:
        return f"{reason} but the variant {copies[0]}: variants that can be read are {', '.join(VARIANTS)}"
    if unnamed:
        return (
            f"there is no weight file that diffusers reads in {folder.name}, but {unnamed[0]}: save the pipeline with "
            "save_pretrained, which names it"
        )
    if others:
        return f"{reason} but {others[0]}: save the pipeline with save_pretrained, which writes safetensors"
    return reason


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file (name -> dtype, shape, offsets) and the size that it should have; -1 if invalid.

    The size is 8 bytes for the header's length, the header, and the last end of a tensor.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return {}, 8 + length
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in tensors.values() if entry["dtype"]]
            return tensors, 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return {}, -1


def _read_variant(folder: Path, variant: str) -> str:
    """The variant, if the part has it, else PLAIN."""
    return variant if any(variant_of(file.name) == variant for file in own_files(folder)) else PLAIN


def _indices(folder: Path, variant: str) -> list[Path]:
    """Indices of shards: model.safetensors.index.json, of a variant model.safetensors.index.fp16.json."""
    read = _read_variant(folder, variant)
    return sorted(folder.glob(f"{WEIGHT_FILES}.index.{read}.json" if read else f"{WEIGHT_FILES}.index.json"))
