"""Loads a diffusers pipeline whose files were found, and refuses one with weights missing: they would be random."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from common.backbones.files.pipeline_files import INDEX, PipelineFiles
from common.errors import ModelError, one_line
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


def require_classes(files: PipelineFiles, kind: type[DiffusionPipeline]) -> None:
    """Refuse a transformer or VAE of another class than the pipeline's own: training uses their inner layers.

    Raises:
        ModelError: there is one.
    """
    parameters = inspect.signature(kind.__init__).parameters
    for part in ("transformer", "vae"):
        found, own = files.index[part][1], parameters[part].annotation.__name__
        if found != own:
            raise files.broken(
                f"its {part} is of class {found}, and training needs {own}: save the pipeline with that one"
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
        with quiet_libraries():
            models = _models(files, dtype)
            options: dict[str, Any] = load_options(files, kind) | dict.fromkeys(not_loaded) | models
            if all(part in models for part in files.parts if files.has_safetensors(part)):
                options.pop("variant", None)
            pipeline = kind.from_pretrained(files.directory, dtype=dtype, local_files_only=True, **options)
    except ModelError:
        raise
    except Exception as error:  # diffusers raises a different class for each kind of broken directory
        raise files.broken(one_line(error)) from error
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            require_loaded(files, part, module)
    return pipeline


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let diffusers and transformers log errors alone while they load weights.

    Their reports on weights that do not fit fill screens; our messages have the relevant part.
    """
    before = [(logging, logging.get_verbosity()) for logging in (diffusers_logging, transformers_logging)]
    try:
        for logging, _ in before:
            logging.set_verbosity_error()
        yield
    finally:
        for logging, verbosity in before:
            logging.set_verbosity(verbosity)


def require_loaded(files: PipelineFiles, part: str, module: torch.nn.Module) -> None:
    """ModelError if diffusers found no value for a parameter or for a buffer that is saved with the weights.

    It leaves such a parameter without memory and only warns. A buffer keeps its initial value: of FLUX.2's VAE the mean
    0 and variance 1, with which every image would be wrong.
    """
    own = module.state_dict()
    missing = [name for name, value in own.items() if value.is_meta]
    if files.has_safetensors(part):
        saved = files.weight_shapes(part)
        buffers = [name for name, _ in module.named_buffers() if name in own and not is_recomputed(name)]
        missing += [name for name in buffers if name not in saved]
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


def _models(files: PipelineFiles, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The models among the parts, each with its own variant, with every weight that transformers would make up."""
    models: dict[str, torch.nn.Module] = {}
    for part in (name for name in files.parts if files.has_safetensors(name)):
        library, name = files.index[part]
        options = {"dtype": dtype, "local_files_only": True, "variant": files.variant_of(part)}
        if library == "diffusers":
            models[part] = getattr(diffusers, name).from_pretrained(files.directory / part, **options)
        elif library == "transformers":
            kind = getattr(transformers, name)
            models[part], report = kind.from_pretrained(
                files.directory / part, output_loading_info=True, use_safetensors=True, **options
            )
            if report["missing_keys"]:
                raise _incomplete(files, part, [str(key) for key in report["missing_keys"]])
    return models


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
