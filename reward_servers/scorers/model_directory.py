"""Reading of a scorer's model directory. Each missing, corrupt or foreign file is a ModelError that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common import git_lfs
from common.errors import ModelError
from common.weight_names import (
    ADAPTER_BESIDE,
    ADAPTER_CONFIG,
    MERGE_REMEDY,
    WRAPPERS,
    adapter_weight,
    common_variant,
    is_recomputed,
    quantised_weight,
    usable_variants,
    wrapper_prefix,
)
from common.wire import fingerprint, tensor_hashes

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
MODEL_FILES = "model[.-]*safetensors"
"""Names of a transformers model's weights: whole or in shards, with or without a variant."""
CHECKPOINTS = ("*.pt", "*.pth")
"""Names of published checkpoints that are converted first."""
REWARD_WRAPPERS = (*WRAPPERS, "model.")
"""A reward model is often an attribute `model` of the module that was trained."""

State = dict[str, torch.Tensor]
Model = TypeVar("Model", bound=PreTrainedModel)
Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)


def require_directory(model_dir: Path | None, scorer: str) -> Path:
    """The model directory of a scorer that requires one."""
    if model_dir is None:
        raise ModelError(f"the {scorer} scorer needs its model directory: pass --model DIR")
    _require_no_adapter(model_dir)
    return model_dir


def _require_no_adapter(directory: Path) -> None:
    """ModelError if peft's adapter is beside the weights: transformers would add it to them, perhaps once more."""
    if (directory / ADAPTER_CONFIG).exists():
        raise ModelError(f"the model in {directory} has {ADAPTER_BESIDE}")


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _not_of_this_scorer(path) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} holds a JSON {type(settings).__name__}, not an object")
    return settings


def read_weights(path: Path) -> State:
    """The named tensors of a safetensors file, see `unwrapped`."""
    try:
        _read_names([path])
        return unwrapped(load_file(path))
    except FileNotFoundError as error:
        raise _not_of_this_scorer(path) from error
    except PermissionError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}: let this user read it") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or corrupt ({error}): copy it again") from error


def _not_of_this_scorer(missing: Path) -> ModelError:
    found = sorted(file.name for kind in CHECKPOINTS for file in missing.parent.glob(kind))
    remedy = f"convert {found[0]}, which is there, with rtdmd convert" if found else ""
    return ModelError(f"{missing} is missing: {remedy or f'is {missing.parent} the model directory of this scorer?'}")


def unwrapped(state: State) -> State:
    """The tensors without the prefix of a training wrapper, if all have it: `module.`, `_orig_mod.`, `model.` ..."""
    prefix = wrapper_prefix(state.keys(), REWARD_WRAPPERS)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Fill `model` with `state`, as float32; names and shapes must match one to one, except for bookkeeping."""
    foreign = set(foreign_names(state.keys() - model.state_dict().keys(), model))
    known = state.keys() & model.state_dict().keys()
    try:
        model.load_state_dict({name: state[name].float() for name in state if name in known | foreign}, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{source} does not fit the architecture it was loaded into: {shorten(error)}") from error


def foreign_names(unexpected: Collection[str], model: nn.Module) -> list[str]:
    """Those of the unexpected names that are weights of another model, not tensors that this one computes anew."""
    saved = {name.rpartition(".")[2] for name in model.state_dict()}
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()} - saved
    return sorted(name for name in unexpected if not is_recomputed(name, buffers))


def load_pretrained(kind: type[Model], directory: Path) -> Model:
    """A transformers model in float32 from safetensors (or, alone, their fp16 copy), with exactly its weights."""
    if not (directory / CONFIG_FILE).is_file():
        raise _not_of_this_scorer(directory / CONFIG_FILE)
    _require_no_adapter(directory)
    require_unquantised(directory)
    _require_safetensors(directory)
    variant = common_variant([usable_variants(file.name for file in directory.glob(MODEL_FILES))])
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    # Its report on a directory that does not fit fills screens; our message has the relevant part.
    transformers_logging.set_verbosity_error()
    try:
        loaded: tuple[Model, dict[str, set[str]]] = kind.from_pretrained(
            directory,
            local_files_only=True,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=_without_wrapper(_read_names(_model_files(directory, variant))),
            variant=variant or None,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory} holds no readable {kind.__name__}: {shorten(error)}") from error
    finally:
        transformers_logging.set_verbosity(before)
    model, report = loaded
    require_complete(report, model, directory)
    return model


def _require_safetensors(directory: Path) -> None:
    if not any(directory.glob(MODEL_FILES)):
        others = sorted(file.name for kind in ("*.bin", *CHECKPOINTS) for file in directory.glob(kind))
        found = f" but {others[0]}" if others else ""
        raise ModelError(
            f"there is no model.safetensors in {directory}{found}: load the model with transformers and save it with "
            "save_pretrained, which writes safetensors"
        )


def require_unquantised(directory: Path) -> None:
    """ModelError if the configuration says that the weights are quantised: their scores would be others."""
    settings = read_settings(directory / CONFIG_FILE).get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise _quantised(directory, f"quantization_config.quant_method = {method}")


def _quantised(source: Path, found: str) -> ModelError:
    return ModelError(
        f"the weights in {source} are quantised ({found}), and scores are those of the unquantised model: take its "
        "published weights"
    )


def _model_files(directory: Path, variant: str) -> list[Path]:
    """The weight files that transformers reads: the whole one, else the shards of the index; none without either."""
    ending = f".{variant}" if variant else ""
    whole, index = directory / f"model{ending}.safetensors", directory / f"model.safetensors.index{ending}.json"
    if whole.is_file() or not index.is_file():
        return [whole] * whole.is_file()
    shards = read_settings(index).get("weight_map")
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else ()
    return [directory / name for name in sorted(names)]


def _read_names(files: Sequence[Path]) -> list[str]:
    """The names of all weights in these files; ModelError if one is of a LoRA, or quantised, whatever a config says."""
    names: list[str] = []
    for file in files:
        # Opened as a file first: safetensors says of a file that may not be read that it is not there.
        if git_lfs.is_pointer(file):
            raise ModelError(f"{file} {git_lfs.REMEDY}")
        with safe_open(file, "pt") as header:
            types = {name: header.get_slice(name).get_dtype() for name in header.keys()}  # noqa: SIM118
        if found := quantised_weight(types):
            raise _quantised(file, found)
        if found := adapter_weight(types):
            raise ModelError(
                f"the weights in {file} have an unmerged LoRA ({found}), and only merged weights are supported: "
                f"{MERGE_REMEDY}"
            )
        names += types
    return names


def _without_wrapper(names: Collection[str]) -> dict[str, str] | None:
    """A renaming that removes the prefix of a training wrapper, see `unwrapped`; None if there is none."""
    prefix = wrapper_prefix(names, REWARD_WRAPPERS)
    return {f"^{re.escape(prefix)}": ""} if prefix else None


def require_complete(report: Mapping[str, set[str]], model: nn.Module, source: Path) -> None:
    """Refuse mismatches that from_pretrained only reports: it fills missing weights with random numbers."""
    found = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    found["unexpected_keys"] = foreign_names(found["unexpected_keys"], model)
    for mismatch, names in found.items():
        if names:
            raise ModelError(f"the weights in {source} have {mismatch.replace('_', ' ')}, such as {names[0]}")


def load_tokenizer(
    kind: type[Tokenizer], directory: Path, vocabulary_files: tuple[str, ...], vocabulary_size: int
) -> Tokenizer:
    """A tokenizer from `tokenizer.json` or from its `vocabulary_files`, with no more tokens than the model embeds."""
    for name in (TOKENIZER_FILE, *vocabulary_files):
        if (directory / name).is_file() and git_lfs.is_pointer(directory / name):
            raise ModelError(f"{directory / name} {git_lfs.REMEDY}")
    complete = (directory / TOKENIZER_FILE).is_file() or all((directory / name).is_file() for name in vocabulary_files)
    if not complete:
        files = " and ".join(vocabulary_files)
        raise ModelError(f"{directory} has no tokenizer: {TOKENIZER_FILE}, or {files}, must be there")
    try:
        tokenizer: Tokenizer = kind.from_pretrained(directory, local_files_only=True, padding_side="right")
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise ModelError(f"the tokenizer in {directory} cannot be read: {shorten(error)}") from error
    if len(tokenizer) > vocabulary_size:
        raise ModelError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, its model embeds {vocabulary_size}: "
            "they do not belong together"
        )
    return tokenizer


def hash_weights(*models: nn.Module) -> str:
    """Identity of the weights of several models, in this order, in any dtype, bit by bit."""
    arrays = {
        f"{number}.{name}": tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        for number, model in enumerate(models)
        for name, tensor in model.state_dict().items()
    }
    return fingerprint(tensor_hashes(arrays))


def shorten(error: Exception) -> str:
    """A library's multi-line message on one line."""
    return " ".join(str(error).split())[:300]
