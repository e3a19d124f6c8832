"""Names in weight files that are no weights of the model: bookkeeping of older versions, and wrappers' prefixes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
