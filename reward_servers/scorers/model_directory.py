"""Reading of a scorer's model directory. Each missing, corrupt or foreign file is a ModelError that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common.errors import ConfigError, ModelError
from common.wire import fingerprint, tensor_hashes

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

State = dict[str, torch.Tensor]
Model = TypeVar("Model", bound=PreTrainedModel)
Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)


def require_directory(model_dir: Path | None, scorer: str) -> Path:
    """The model directory of a scorer that requires one."""
    if model_dir is None:
        raise ModelError(f"the {scorer} scorer needs its model directory: pass --model DIR")
    return model_dir


def require_device(device: str) -> None:
    """ConfigError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # without CUDA support torch raises AssertionError
        message = f"--device {device} cannot be used: {shorten(error)}"
        raise ConfigError(
            f"{message}; cpu can everywhere, cuda where there is a GPU and a torch built for it"
        ) from error


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
    """The named tensors of a safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise _not_of_this_scorer(path) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or corrupt ({error}): copy it again") from error


def _not_of_this_scorer(missing: Path) -> ModelError:
    return ModelError(f"{missing} is missing: is {missing.parent} the model directory of this scorer?")


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Fill `model` with `state`, as float32; names and shapes must match one to one."""
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{source} does not fit the architecture it was loaded into: {shorten(error)}") from error


def load_pretrained(kind: type[Model], directory: Path) -> Model:
    """A transformers model in float32 from safetensors, with exactly the weights that it has."""
    if not (directory / CONFIG_FILE).is_file():
        raise _not_of_this_scorer(directory / CONFIG_FILE)
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
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory} holds no readable {kind.__name__}: {shorten(error)}") from error
    finally:
        transformers_logging.set_verbosity(before)
    model, report = loaded
    require_complete(report, directory)
    return model


def require_complete(report: Mapping[str, set[str]], source: Path) -> None:
    """Refuse mismatches that from_pretrained only reports: it fills missing weights with random numbers."""
    for mismatch in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[mismatch]:
            example = min(str(key) for key in report[mismatch])
            raise ModelError(f"the weights in {source} have {mismatch.replace('_', ' ')}, such as {example}")


def load_tokenizer(
    kind: type[Tokenizer], directory: Path, vocabulary_files: tuple[str, ...], vocabulary_size: int
) -> Tokenizer:
    """A tokenizer from `tokenizer.json` or from its `vocabulary_files`, with no more tokens than the model embeds."""
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
