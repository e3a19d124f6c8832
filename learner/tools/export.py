"""Export a run's trained weights for other programs.

    rtdmd export --run runs/NAME --format lora|pipeline|comfyui --out DIR

    lora       a LoRA in diffusers' format, for `load_lora_weights`; a finished run has the same in `lora/`
    pipeline   a whole diffusers directory, with the student's adapters merged into the transformer's weights
    comfyui    NAME-POLICY.safetensors, one LoRA file for ComfyUI's loaders, which diffusers loads too

ComfyUI (comfy/lora.py, comfy/weight_adapter/lora.py) maps `transformer.` + a module's path in diffusers to its own
weights for SD3 and Flux models, a third of the fused qkv where necessary. It adds B A times `.alpha` / rank, or times 1
if a file has no `.alpha`. It does not read diffusers' metadata. In both LoRAs here the scale is multiplied into B,
and no file has an `.alpha`, so every tool takes a scale of 1.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.backbones.diffusers_backbone import DiffusersBackbone
from common.backbones.files.pipeline_files import INDEX, LICENCES, read_index, require_parts_alone
from common.command import user_path
from common.config.run import Config
from common.errors import ConfigError, ModelError
from common.types import Guidance
from common.whole_files import whole_files
from learner.tools.options import tool_status
from learner.tools.trained_run import ALIGNED_POLICY, COLD_START_POLICY, TrainedRun
from learner.training.lora_file import LORA_PREFIX, scaled_lora, student_lora, write_lora

FORMATS = ("lora", "pipeline", "comfyui")
TRANSFORMER = "transformer"
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def write_comfyui(state: Mapping[str, Tensor], scale: float, path: Path) -> None:
    """Write one LoRA file as described in the module docstring; `state` as from `student_lora`."""
    scaled = {f"{LORA_PREFIX}{key}": value for key, value in scaled_lora(state, scale).items()}
    with whole_files(path.parent) as folder:
        save_file(scaled, folder / path.name, metadata={"format": "pt"})


def write_pipeline(state: Mapping[str, Tensor], scale: float, base: Path, directory: Path) -> None:
    """Write the pipeline at `base` with `scale` B A added to its transformer's weights; copy everything else unchanged.

    The sum is computed in float32 and rounded to the type of the files.

    Raises:
        ModelError: `base` is not a directory with safetensors, or lacks a weight that an adapter belongs to.
        OSError: `directory` cannot be written; nothing stays in it.
    """
    if not (base / INDEX).is_file():
        raise ModelError(f"no pipeline at {base}: a local diffusers directory is needed, name it with --base")
    files = read_index(base, base)
    weights = files.weight_files(TRANSFORMER)  # of the variant that training reads, which all parts decide
    checked = replace(files, parts=(TRANSFORMER,))
    require_parts_alone(checked)
    checked.require_usable_weights()
    with _removed_on_failure(directory):
        for file in sorted([base / INDEX, *base.glob(LICENCES)]):
            _copy(file, directory / file.name)
        for part in sorted(entry.name for entry in base.iterdir() if entry.is_dir() and entry.name in files.index):
            for file in sorted(found for found in (base / part).rglob("*") if found.is_file()):
                if part != TRANSFORMER or file.suffix not in WEIGHT_SUFFIXES:
                    _copy(file, directory / file.relative_to(base))
        missing = {key.rpartition(".lora_")[0] for key in state}
        for file in weights:
            missing -= _merge_file(state, scale, file, directory / TRANSFORMER / file.name)
        if missing:
            raise ModelError(f"{base / TRANSFORMER} has no safetensors weight of {sorted(missing)[:3]}: another model?")


@contextmanager
def _removed_on_failure(directory: Path) -> Iterator[None]:
    """Fill a directory that is empty or absent; after an error it is so again."""
    absent = not directory.exists()
    try:
        yield
    except BaseException:
        for entry in directory.iterdir() if directory.is_dir() else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if absent and directory.is_dir():
            directory.rmdir()
        raise


def _copy(source: Path, target: Path) -> None:
    """Copy the content alone: a file of a read-only base may be read-only too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _merge_file(state: Mapping[str, Tensor], scale: float, source: Path, target: Path) -> set[str]:
    """Write one file of weights with its updates; return the updated modules."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(source)
    merged = set()
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and f"{module}.lora_A.weight" in state:
            update = state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
            weights[key] = (weight.float() + scale * update).to(weight.dtype)
            merged.add(module)
    with whole_files(target.parent) as folder:
        save_file(weights, folder / target.name, metadata=metadata)
    return merged


def _export(arguments: argparse.Namespace) -> Iterator[str]:
    """Lines to print: the written path, and how to sample with it."""
    out: Path = arguments.out
    if arguments.format == "pipeline" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there and not empty: a pipeline needs a directory of its own")
    run = TrainedRun.open(arguments.run, arguments.base)
    backbone = run.load(arguments.policy, "cpu")
    state, scale = student_lora(backbone), backbone.adapters.scale
    steps = run.config.sampling.steps
    base, load = run.config.backbone.path, ""
    if arguments.format == "lora":
        write_lora(backbone, out)
        load = f'pipeline.load_lora_weights("{out}")'
        yield f"{out}\n"
    elif arguments.format == "comfyui":
        path = out / f"{run.title}-{arguments.policy}.safetensors"
        write_comfyui(state, scale, path)
        load = f'pipeline.load_lora_weights("{out}", weight_name="{path.name}")'
        yield f"{path}\n\nIn ComfyUI: {steps} steps, cfg 1, strength 1. In diffusers:\n"
    else:
        # For a hub name: the path of the download.
        write_pipeline(state, scale, backbone.directory if isinstance(backbone, DiffusersBackbone) else base, out)
        base = out
        yield f"{out}\n"
    # Without a dtype, diffusers loads each part as it was saved, and the parts may differ.
    how = [f"dtype=torch.{run.config.backbone.dtype}"]
    if isinstance(backbone, DiffusersBackbone):
        how += [f"{name}={value!r}" for name, value in backbone.load_options().items()]
    yield f'    pipeline = DiffusionPipeline.from_pretrained("{base}", {", ".join(how)})'
    if load:
        yield f"    {load}"
    call = ", ".join(f"{name}={value}" for name, value in _call_options(run.config, backbone.guidance).items())
    yield f"    pipeline(prompt, {call})"


def _call_options(config: Config, guidance: Guidance) -> dict[str, str]:
    """Arguments of a diffusers call with which a pipeline samples as the student was trained."""
    steps, settings = config.sampling.steps, config.backbone.model_dump()
    # Guidance that is an input keeps the value that the student was trained with.
    scale = settings.get("student_guidance", 1.0) if guidance is Guidance.INPUT else 1.0
    options = {
        "sigmas": f"[{', '.join(f'{1 - step / steps:g}' for step in range(steps))}]",
        "guidance_scale": str(scale),
    }
    if "max_sequence_length" in settings:
        options["max_sequence_length"] = str(settings["max_sequence_length"])
    return options


def main(argv: Sequence[str]) -> int:
    """Return the exit status as in `learner.tools.options.tool_status`."""
    parser = argparse.ArgumentParser(
        prog="rtdmd export",
        description="Export the student as a LoRA, as a pipeline with the LoRA merged, or as one file for ComfyUI.",
    )
    parser.add_argument(
        "--run", type=user_path, required=True, metavar="DIR", help="run directory, or one of its checkpoints"
    )
    parser.add_argument("--base", type=user_path, metavar="DIR", help="directory of the base model, if it has moved")
    parser.add_argument("--format", choices=FORMATS, required=True, help="see docs/using_a_run.md")
    parser.add_argument(
        "--policy",
        choices=(ALIGNED_POLICY, COLD_START_POLICY),
        default=ALIGNED_POLICY,
        help=f"policy to export (default {ALIGNED_POLICY})",
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="directory for the export")
    arguments = parser.parse_args(argv)

    def export() -> None:
        print("\n".join(_export(arguments)))

    return tool_status(export, arguments.out)
