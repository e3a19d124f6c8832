"""Reading a transformers model from a directory, or saying what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.errors import ModelError
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.clip import shorten

Model = TypeVar("Model", bound=PreTrainedModel)


def load_pretrained(kind: type[Model], directory: Path | None, **options: Any) -> Model:
    """A model from safetensors; ModelError when files are missing, broken or do not fit one another.

    `options` go to from_pretrained. Without a directory they must hold `config` and `state_dict`.
    """
    transformers_logging.disable_progress_bar()
    source = "the weights" if directory is None else f"the weights in {directory}"
    try:
        model, report = kind.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"no {kind.__name__} can be read from {source}: {shorten(error)}") from error
    # from_pretrained fills what it does not find with random numbers and goes on.
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            example = min(str(key) for key in report[fault])
            raise ModelError(f"{source} do not fit {kind.__name__}: {fault.replace('_', ' ')}, such as {example}")
    return model


def hash_weights(*models: torch.nn.Module) -> str:
    """Identity of the weights of a scorer's models, in that order, bit by bit."""
    arrays = {
        f"{number}.{name}": tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        for number, model in enumerate(models)
        for name, tensor in model.state_dict().items()
    }
    return fingerprint(tensor_hashes(arrays))
