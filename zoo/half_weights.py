"""Weights on disk: float16 safetensors, read back as float32. Figures are measured with the weights read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.git_lfs import REMEDY, is_pointer


def save_half(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dict; floating tensors as float16, others unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: _half(value.detach()).contiguous().cpu() for name, value in state.items()}
    save_file(halves, path, metadata={"format": "pt"})


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


@contextmanager
def rebuildable(what: str, directory: Path) -> Iterator[None]:
    """Inside this block a model is read from a directory; whatever is wrong with its files becomes a ModelError."""
    try:
        yield
    except FileNotFoundError as error:
        lack = f"{Path(error.filename).name} is missing"
        raise ModelError(f"no {what} at {directory} ({lack}): rebuild it with `python -m zoo.build`") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{directory} holds no usable {what} ({error}): rebuild it") from error


def load_full(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict; floating tensors as float32.

    Raises:
        ModelError: the file is missing or is not a complete safetensors file.
    """
    if not path.is_file():
        raise ModelError(f"no weights at {path}: rebuild them with `python -m zoo.build`")
    if is_pointer(path):
        raise ModelError(f"{path} {REMEDY}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is truncated or corrupt ({error}): rebuild it with `python -m zoo.build`") from error
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
