"""Turn LoRA files into the start of a run: the authors' released adapters, or any LoRA for the base model.

    rtdmd import SOURCE [SOURCE ...] --config RUN_FILE --out DIR [--section.key VALUE ...]

    SOURCE    a directory, a file, or ORGANISATION/NAME[/FOLDER] of the Hugging Face hub; several are stacked
    DIR       config.yaml and checkpoints/cold_start-000000: a run that has trained nothing yet, with these weights as
              its student

The checkpoint starts stage 2 of other runs (`cold_start.from_checkpoint`), or stage 1 of this one (`--resume`), and
`rtdmd generate`, `evaluate` and `export` read the directory with `--policy cold_start`. Several LoRAs become one: their
updates add, so their ranks are concatenated, without loss. The ranks of `lora.rank` that are left start as fresh ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import load_backbone
from common.backbones.adapters import AdapterBank
from common.backbones.base import Backbone, parts_fingerprint
from common.backbones.diffusers_backbone import DiffusersBackbone
from common.backbones.lora_targets import adapted_layers, suffixes
from common.command import exit_status, user_path
from common.config.run import Config
from common.errors import ConfigError
from common.types import Network, Position, Stage
from common.visible_text import printable
from common.whole_files import write_whole
from learner.checkpoint import CheckpointStore
from learner.driver.run_directory import continuity
from learner.preflight.command_line import parse_with, run_file_parser
from learner.preflight.run_file import dump_config
from learner.tools.lora_file_formats import ForeignLora, State, read_lora
from learner.tools.lora_sources import find_lora
from learner.tools.options import tool_status
from learner.training.networks import COLD_START, FAKE_SCORE, Networks, StageSettings

START = Position(Stage.COLD_START, 0)


def import_weights(
    config: Config, sources: Sequence[str], fake_score: Sequence[str], out: Path, alpha: float | None = None
) -> Iterator[str]:
    """Write the run directory `out`; yield lines that say what was imported and how to use it.

    Args:
        sources: LoRAs of the student, see `find_lora`; their updates add.
        fake_score: LoRAs of the fake score, likewise; none leaves it equal to its base.
        alpha: that of files which state no scale.

    Raises:
        ModelError: a source is missing or damaged, or is no plain LoRA.
        WeightUpdateError: a weight fits no layer of the base.
        ConfigError: `lora.rank` or `lora.targets` has no room for the weights, `alpha` is missing or not needed, or
            `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there and not empty: name a directory of its own")
    found = [find_lora(source) for source in sources]
    found_fake = [find_lora(source) for source in fake_score]
    config = config.model_copy(
        update={"cold_start": config.cold_start.model_copy(update={"from_checkpoint": None})},
    )
    backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    networks = Networks(backbone, StageSettings.of(config.cold_start), config.run.seed)
    loras = [_read(file, backbone, alpha) for file in found]
    fake_loras = [_read(file, backbone, alpha) for file in found_fake]
    if alpha is not None and all(lora.states_scale for lora in (*loras, *fake_loras)):
        raise ConfigError(f"--alpha {alpha:g}: {loras[0].file} states its own scale: leave the option out")
    student = fitted(backbone.adapters, COLD_START, Network.STUDENT, loras)
    yield from (_described(lora, config) for lora in loras)
    yield _fresh_layers(backbone.adapters, COLD_START, loras)
    if fake_loras:
        backbone.adapters.load(FAKE_SCORE, fitted(backbone.adapters, FAKE_SCORE, Network.FAKE_SCORE, fake_loras))
        yield from (f"fake score: {_described(lora, config)}" for lora in fake_loras)
    else:
        yield (
            "fake score: equal to its base, since --fake-score names none. It has not seen the student's samples: some "
            "iterations of stage 1 first, or a higher alignment.learning_rate_fake, let it catch up"
        )
    backbone.adapters.load(COLD_START, student)
    networks.average.load(student)
    checkpoint = CheckpointStore.of_run(out).save(
        START, networks.state(), continuity(config), backbone.base_fingerprint(), parts_fingerprint(backbone)
    )
    write_whole(out / "config.yaml", dump_config(config).encode())
    yield from ("", *_uses(out, checkpoint))


def fitted(bank: AdapterBank, adapter: str, network: Network, loras: Sequence[ForeignLora]) -> State:
    """The LoRAs as weights for `adapter`, which is fresh: ranks and layers that they do not use keep A, with B zero.

    Raises:
        WeightUpdateError: a weight fits no layer of the network's base.
        ConfigError: the adapter has too few ranks or layers.
    """
    fresh = bank.state(adapter)
    own = set(adapted_layers(fresh))
    ranks: dict[str, int] = {}
    for lora in loras:
        for layer, rank in bank.fitting_ranks(printable(lora.file), lora.state, network).items():
            ranks[layer] = ranks.get(layer, 0) + rank
    outside = sorted(ranks.keys() - own)
    if outside:
        targets = suffixes(ranks.keys() | own)
        raise ConfigError(
            f"lora.targets do not bind to {outside[0]} and {len(outside) - 1} more layers that the LoRA is on: add "
            f'--lora.targets "[{", ".join(targets)}]"'
        )
    room, most = next(iter(fresh.values())).shape[0], max(ranks.values())
    if most > room:
        scale = Fraction(bank.scale).limit_denominator(room)
        enough = -(-most // scale.denominator) * scale.denominator  # alpha is a whole number
        raise ConfigError(
            f"the LoRA has rank {most}{' in total' * (len(loras) > 1)}, lora.rank is {room}: add --lora.rank {enough} "
            f"--lora.alpha {enough * scale}, which keep the scale alpha / rank"
        )
    parts = [lora.scaled(bank.scale) for lora in loras]
    return {key: _filled(key, like, [part[key] for part in parts if key in part]) for key, like in fresh.items()}


def _filled(key: str, fresh: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The parts' ranks, then what is left of a fresh A, or of zeros for B."""
    axis = 0 if ".lora_A." in key else 1
    used = sum(part.shape[axis] for part in parts)
    return torch.cat([*parts, fresh.narrow(axis, used, fresh.shape[axis] - used)], dim=axis)


def _read(file: Path, backbone: Backbone, alpha: float | None) -> ForeignLora:
    def convert(tensors: State) -> State:
        return backbone.converted_lora(tensors) if isinstance(backbone, DiffusersBackbone) else tensors

    return read_lora(file, lambda tensors: convert(dict(tensors)), alpha)


def _described(lora: ForeignLora, config: Config) -> str:
    layers = adapted_layers(lora.state)
    ranks = sorted({value.shape[0] for key, value in lora.state.items() if ".lora_A." in key})
    scales = sorted(set(lora.scales.values()))
    said = f"says that its base is {lora.base}" if lora.base else "does not say which base it is of"
    return (
        f"{printable(lora.file)}: {len(layers)} layers, rank {_span(ranks)}, scale {_span(scales)}. "
        f"It {said}; its shapes fit {config.backbone.path}"
    )


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _fresh_layers(bank: AdapterBank, adapter: str, loras: Sequence[ForeignLora]) -> str:
    own = adapted_layers(bank.parameters(adapter))
    used = {layer for lora in loras for layer in adapted_layers(lora.state)}
    left = f"; the other {len(own) - len(used)} start fresh, without effect" if len(own) > len(used) else ""
    return f"student: imported on {len(used)} of the {len(own)} layers that lora.targets bind to{left}"


def _uses(out: Path, checkpoint: Path) -> Iterator[str]:
    """Commands that use the imported directory."""
    directory, start = shlex.quote(str(out)), shlex.quote(str(checkpoint))
    yield f"start of stage 2:  rtdmd train --config RUN.yaml --cold_start.from_checkpoint {start}"
    yield f"start of stage 1:  rtdmd train --config RUN.yaml --run-dir {directory} --resume"
    yield f"pictures:          rtdmd generate --run {directory} --policy cold_start --prompt TEXT --out pictures"


def _parser() -> argparse.ArgumentParser:
    parser = run_file_parser(
        "rtdmd import",
        "--out DIR",
        "Turn LoRA files into the start of a run: released RTDMD adapters, or any LoRA for the base model.",
    )
    parser.usage = "rtdmd import SOURCE [SOURCE ...] [--config FILE] --out DIR [--section.key VALUE ...]"
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="run directory to write")
    parser.add_argument(
        "--fake-score",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="LoRAs of the fake score (the authors' fake_score_net.pt); default: none",
    )
    parser.add_argument(
        "--alpha", type=float, metavar="N", help="lora_alpha of the files that do not state theirs (the authors': 64)"
    )
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Config, argparse.Namespace]:
    """The run file with its overrides, and the command's own options with `sources`.

    Raises:
        ConfigError: the command line or the run file is not valid.
    """
    # Sources come before all options: argparse would take the value of an override for another one.
    count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    config, arguments = parse_with(_parser(), argv[count:], environ)
    if not count:
        raise ConfigError("name a LoRA to import: rtdmd import SOURCE --config RUN_FILE --out DIR")
    arguments.sources = list(argv[:count])
    return config, arguments


def main(argv: Sequence[str]) -> int:
    """Return the exit status as in `learner.tools.options.tool_status`."""
    parsed: list[tuple[Config, argparse.Namespace]] = []
    status = exit_status(lambda: parsed.append(parse(argv, os.environ)))
    if not parsed:
        return status
    config, arguments = parsed[0]

    def report() -> None:
        for line in import_weights(config, arguments.sources, arguments.fake_score, arguments.out, arguments.alpha):
            print(line, flush=True)

    return tool_status(report, arguments.out)
