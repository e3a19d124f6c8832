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
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from common.backbones.files.pipeline_files import CONFIG, INDEX, PipelineFiles
from common.backbones.files.weight_files import unmerged_reason
from common.errors import ModelError, one_line
from common.weight_names import adapter_weight, is_recomputed

NOT_OPTIONS = (
    "force_upcast",
    "dtype",
    "torch_dtype",
    *("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
)
"""Keys of published configurations that change no output: types, and the state of diffusers' EMAModel."""


def pipeline_kind(files: PipelineFiles) -> type[DiffusionPipeline]:
    """The class that a pipeline's index names.

    Raises:
        ModelError: the installed diffusers has no such pipeline.
    """
    kind = getattr(diffusers, files.kind, None)
    if isinstance(kind, type) and issubclass(kind, DiffusionPipeline):
        return kind
    raise files.broken(
        f"its {INDEX} names the class {files.kind}, and diffusers {diffusers.__version__} has no such pipeline: save "
        "it as one of its classes"
    )


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
    for part in ("transformer", "vae"):
        found, own = files.index[part][1], part_kind(kind, part)
        if found != own.__name__:
            raise files.broken(
                f"its {part} is of class {found}, and training needs {own.__name__}: save the pipeline with that one"
            )
        require_known_options(files, part, own)


def part_kind(kind: type[DiffusionPipeline], part: str) -> type[torch.nn.Module]:
    """The class of a part, from the annotation in its pipeline's class."""
    found: type[torch.nn.Module] = inspect.signature(kind.__init__).parameters[part].annotation
    return found


def require_known_options(files: PipelineFiles, part: str, kind: type[torch.nn.Module]) -> None:
    """ModelError if a part's configuration has an option that its class does not know: diffusers would ignore it."""
    if reason := ignored_option(files, part, kind):
        raise files.broken(f"{reason}: take the model's own {CONFIG}, or remove that option if it changes nothing")


def ignored_option(files: PipelineFiles, part: str, kind: type[torch.nn.Module]) -> str | None:
    """The first option of a part's configuration that its class ignores, unless it is empty, null or false."""
    known = (*inspect.signature(kind.__init__).parameters, *NOT_OPTIONS)
    options = {name: value for name, value in files.config(part).items() if value and not name.startswith("_")}
    found = next((name for name in options if name not in known), None)
    return found and (
        f"its {part}/{CONFIG} has {found} = {options[found]}, which {kind.__name__} of diffusers "
        f"{diffusers.__version__} ignores"
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
            models = _models(files, dtype, not_loaded)
            options: dict[str, Any] = load_options(files, kind) | dict.fromkeys(not_loaded) | models
            if all(part in models for part in files.parts if files.has_safetensors(part)):
                options.pop("variant", None)
            pipeline = kind.from_pretrained(files.directory, dtype=dtype, local_files_only=True, **options)
    except ModelError:
        raise
    except Exception as error:  # diffusers raises a different class for each kind of broken directory
        raise files.broken(one_line(error)) from error
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and part not in models:
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


def load_model(files: PipelineFiles, part: str, kind: type[Any], dtype: torch.dtype) -> torch.nn.Module:
    """Load one model of a pipeline, with exactly the weights of its files.

    Raises:
        ModelError: a file is broken, of another model, or lacks a weight that the libraries would make up.
    """
    try:
        with quiet_libraries():
            loaded: tuple[torch.nn.Module, dict[str, list[Any]]] = kind.from_pretrained(
                files.directory / part,
                dtype=dtype,
                local_files_only=True,
                variant=files.variant_of(part),
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # the libraries raise a different class for each kind of broken directory
        raise files.broken(f"{part}: {one_line(error)}") from error
    model, report = loaded
    unexpected = [str(name) for name in report["unexpected_keys"]]
    if found := adapter_weight(unexpected):
        raise files.broken(unmerged_reason(part, found))
    if isinstance(model, transformers.PreTrainedModel) and report["missing_keys"]:
        raise _incomplete(files, part, [str(key) for key in report["missing_keys"]])
    require_loaded(files, part, model)
    _require_own_weights(files, part, model, unexpected)
    return model


def _require_own_weights(files: PipelineFiles, part: str, module: torch.nn.Module, unexpected: Sequence[str]) -> None:
    """ModelError if the files have weights that the model lacks: the libraries only warn, and they are of another one.

    A text encoder may be read from a larger model: from CLIP with its vision tower, from T5 with its decoder.
    """
    saved = {name.rpartition(".")[2] for name in module.state_dict()}
    buffers = {name.rpartition(".")[2] for name, _ in module.named_buffers()} - saved
    foreign = [name for name in unexpected if not is_recomputed(name, buffers)]
    if foreign and isinstance(module, diffusers.ModelMixin):
        raise files.broken(
            f"the files of its {part} have {len(foreign)} weights that the model of its {CONFIG} lacks, such as "
            f"{min(foreign)}: they are of another model"
        )


def _models(files: PipelineFiles, dtype: torch.dtype, not_loaded: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The models among the parts, each with its own variant."""
    kinds = {part: model_kind(files, part) for part in files.parts if part not in not_loaded}
    return {part: load_model(files, part, kind, dtype) for part, kind in kinds.items() if kind}


def model_kind(files: PipelineFiles, part: str) -> type[torch.nn.Module] | None:
    """The class of a part that is a model of diffusers or transformers; None for a tokenizer, a scheduler ..."""
    if not (files.directory / part / CONFIG).is_file():
        return None
    try:
        kind = simple_get_class_obj(*files.index[part])
    except (AttributeError, ValueError):  # a class that the libraries lack: the error of diffusers says so
        return None
    models = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return kind if isinstance(kind, type) and issubclass(kind, models) else None


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
