"""Names of weight files and in them: variants, types, bookkeeping of older versions, prefixes of training wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

VARIANTS = ("bf16", "fp16")
"""Copies in these types are read if a part has no plain copy, in this order of preference."""
PLAIN = ""
"""The variant of a file without one in its name."""
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
"""Types of weights and of their bookkeeping. Any other type is a quantised weight, useless without its scales."""
RECOMPUTED = (
    "position_ids",
    "token_type_ids",
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "inv_freq",
    "num_batches_tracked",
    "n_averaged",
)
"""Tensors that a model computes anew or counts in training only. Older versions of libraries saved them."""
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.")
"""Training wrappers (DDP, torch.compile, DeepSpeed, FSDP) put one of these before the name of every weight."""
ADAPTER_CONFIG = "adapter_config.json"
"""With this file of peft beside the weights, transformers adds the adapter to them, and diffusers does not."""
ADAPTER_BESIDE = (
    f"an adapter beside its weights ({ADAPTER_CONFIG}), which a library may add to them or ignore: merge it into "
    f"the weights, if it is not in them, and remove {ADAPTER_CONFIG}"
)
OF_ADAPTER = re.compile(r"\.base_layer\.|\.lora_|_lora\.(up|down)\.")
"""Names in a model that was saved with its LoRA unmerged: peft's layers, and the attention processors of diffusers."""
MERGE_REMEDY = (
    "merge and unload it (peft's merge_and_unload; diffusers' fuse_lora, then unload_lora_weights) and save the model "
    "again"
)


def variant_of(name: str) -> str:
    """`fp16` for model.fp16.safetensors, and with shards model.fp16-00001-of-00002 or model-00001-of-00002.fp16.

    PLAIN for model.safetensors and model-00001-of-00002.safetensors.
    """
    middle = name.split(".")[1:-1]
    return middle[0].partition("-")[0] if middle else PLAIN


def usable_variants(names: Iterable[str]) -> set[str]:
    """The variants among these weight files that can be read."""
    return {variant_of(name) for name in names} & {PLAIN, *VARIANTS}


def common_variant(parts: Collection[set[str]]) -> str:
    """The variant that is read where a part has it, so that every part with weights can be read; else PLAIN.

    A part with a plain copy needs no variant, but diffusers reads the variant of every part that has it.
    """
    without_plain = [found for found in parts if found and PLAIN not in found]
    fitting = [variant for variant in VARIANTS if all(variant in found for found in without_plain)]
    return fitting[0] if without_plain and fitting else PLAIN


def quantised_weight(types: Mapping[str, str]) -> str | None:
    """The first weight that is quantised, such as `proj.weight is F8_E4M3`; None if every type is one of TYPES.

    `types` has the type of every weight, as the header of a safetensors file has it.
    """
    return next((f"{name} is {kind}" for name, kind in types.items() if kind not in TYPES), None)


def adapter_weight(names: Iterable[str]) -> str | None:
    """The first of these names that belongs to a LoRA which is not merged into the weights."""
    return next((name for name in sorted(names) if OF_ADAPTER.search(name)), None)


def is_recomputed(name: str, buffers: Collection[str] = ()) -> bool:
    """Whether this tensor is bookkeeping: by its own name, or as one of a model's `buffers` that are not saved."""
    last = name.rpartition(".")[2]
    return last in RECOMPUTED or last in buffers


def wrapper_prefix(names: Collection[str], wrappers: Sequence[str] = WRAPPERS) -> str:
    """The wrappers' prefixes that the names of all weights have, such as `module._orig_mod.`; "" if there is none."""
    prefix, weights = "", [name for name in names if not is_recomputed(name)]
    while weights:
        found = [wrapper for wrapper in wrappers if all(name.startswith(prefix + wrapper) for name in weights)]
        if not found:
            break
        prefix += found[0]
    return prefix
