"""Loads a diffusers pipeline whose files were found, and refuses one with weights missing: they would be random."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.backbones.files.pipeline_files import INDEX, PipelineFiles, first_line
from common.errors import ModelError
from common.weight_names import is_recomputed


def require_parts(files: PipelineFiles, kind: type[DiffusionPipeline], optional: Collection[str]) -> None:
    """Refuse a pipeline without a part that its class asks for, unless the part is optional.

    The tokenizer of a text encoder is optional only together with the encoder.

    Raises:
        ModelError: such a part is left out.
    """
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in files.parts if part.startswith("text_encoder")]
    missing = [name for name in _absent(files, kind) if name not in optional or name in tokenizers]
    if missing:
        raise files.broken(
            f"its {INDEX} leaves out {' and '.join(missing)}, and a {kind.__name__} cannot sample without: save the "
            "pipeline again with every part"
        )


def load_options(files: PipelineFiles, kind: type[DiffusionPipeline]) -> dict[str, str | None]:
    """Arguments of `from_pretrained` that this pipeline needs: None for each part it is without, and its variant."""
    options: dict[str, str | None] = dict.fromkeys(_absent(files, kind))
    return options | ({"variant": files.variant} if files.variant else {})


def load_pipeline(
    files: PipelineFiles, kind: type[DiffusionPipeline], dtype: torch.dtype, not_loaded: Sequence[str] = ()
) -> DiffusionPipeline:
    """Load every part that the pipeline has, except `not_loaded`.

    Raises:
        ModelError: a file is broken, of another model, or lacks a weight.
    """
    try:
        options: dict[str, Any] = load_options(files, kind) | dict.fromkeys(not_loaded) | _text_encoders(files, dtype)
        pipeline = kind.from_pretrained(files.directory, dtype=dtype, local_files_only=True, **options)
    except ModelError:
        raise
    except Exception as error:  # diffusers raises a different class for each kind of broken directory
        raise files.broken(first_line(error)) from error
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            require_loaded(files, part, module)
    return pipeline


def require_loaded(files: PipelineFiles, part: str, module: torch.nn.Module) -> None:
    """ModelError if diffusers found no weight for a parameter: it leaves it without memory and only warns."""
    missing = [name for name, value in module.state_dict().items() if value.is_meta]
    if missing:
        raise _incomplete(files, part, missing)


def require_own_weights(files: PipelineFiles, part: str, module: torch.nn.Module) -> None:
    """ModelError if the files have a weight that the model lacks: diffusers only warns, and they are of another one."""
    own = module.state_dict().keys()
    foreign = [name for name in files.weight_shapes(part) if name not in own and not is_recomputed(name)]
    if foreign:
        raise files.broken(
            f"the files of its {part} have {len(foreign)} weights that the model of its config.json lacks, such as "
            f"{min(foreign)}: they are of another model"
        )


def _text_encoders(files: PipelineFiles, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """The text encoders of transformers, which fills missing weights with random numbers and only warns."""
    encoders: dict[str, PreTrainedModel] = {}
    before = transformers_logging.get_verbosity()
    # Its report on weights that do not fit fills screens; our message has the relevant part.
    transformers_logging.set_verbosity_error()
    try:
        for part in (name for name in files.parts if name.startswith("text_encoder")):
            library, name = files.index[part]
            if library != "transformers" or not files.has_safetensors(part):
                continue
            model, report = getattr(transformers, name).from_pretrained(
                files.directory / part,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                variant=files.variant_of(part),
                output_loading_info=True,
            )
            missing = [str(key) for key in report["missing_keys"]]
            if missing:
                raise _incomplete(files, part, missing)
            encoders[part] = model
    finally:
        transformers_logging.set_verbosity(before)
    return encoders


def _absent(files: PipelineFiles, kind: type[DiffusionPipeline]) -> list[str]:
    """The parts that the pipeline's class has no default for, and that the pipeline is without."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    asked_for = [parameter.name for parameter in named if parameter.default is inspect.Parameter.empty]
    return [name for name in asked_for if name not in files.parts]


def _incomplete(files: PipelineFiles, part: str, missing: Sequence[str]) -> ModelError:
    return files.broken(
        f"the files of its {part} lack {len(missing)} of its weights, such as {min(missing)}: they are of another "
        "model, or incomplete"
    )
