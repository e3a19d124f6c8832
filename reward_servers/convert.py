"""Convert published checkpoints to model directories: `python -m reward_servers.convert hps HPS_v2.1_compressed.pt`.

Servers read safetensors only. This command is the only place that opens a `.pt` or `.pth` file: once, by hand, with
`weights_only=True`, which refuses everything but tensors and plain containers. The result is loaded and scores an image
before it gets its final name, so a directory is either complete or does not exist.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from common import git_lfs
from common.command import exit_status, system_error, user_path
from common.errors import ConfigError, ModelError
from common.whole_files import whole_files
from reward_servers.convert_published import HPS_SETTINGS, IMAGE_REWARD_SETTINGS, image_reward_state
from reward_servers.options import USAGE_ERROR
from reward_servers.scorers import aesthetic, hps, image_reward
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.model_directory import (
    CONFIG_FILE,
    State,
    load_pretrained,
    load_state,
    read_settings,
    read_weights,
    shorten,
    unwrapped,
)
from reward_servers.scorers.processor import clip_processor, require_processor

SAFETENSORS = ".safetensors"
HPS_VERSIONS = ("2.0", "2.1")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def main(arguments: list[str] | None = None) -> int:
    """Convert; 0 when the directory was written, else 2 with one line on stderr."""

    def convert() -> None:
        options = build_parser().parse_args(arguments)
        transformers_logging.disable_progress_bar()
        scorer = options.convert(options)
        print(f"{options.out}: {scorer.name} {scorer.version}, weights {scorer.weights_hash}")
        print(f"python -m reward_servers --scorer {scorer.name} --model {options.out}")

    return exit_status(convert, prefix="convert", failed=USAGE_ERROR)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reward_servers.convert",
        description="Turn a published checkpoint into a model directory that a reward server loads.",
    )
    kinds = parser.add_subparsers(required=True, metavar="SCORER")

    def add(name: str, checkpoint: str, convert: Callable[[argparse.Namespace], Scorer]) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=f"from {checkpoint}")
        kind.add_argument("checkpoint", type=user_path, help=checkpoint)
        kind.add_argument("--out", type=user_path, required=True, help="model directory to create; must not exist yet")
        kind.set_defaults(convert=convert)
        return kind

    kind = add("hps", "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of xswu/HPSv2", _from_hps_options)
    kind.add_argument(
        "--version", required=True, choices=HPS_VERSIONS, help="release of the checkpoint, which the file does not name"
    )
    kind.add_argument(
        "--tokenizer", type=user_path, required=True, help="a directory with CLIP's vocab.json and merges.txt"
    )
    _add_architecture(kind, "ViT-H-14")
    kind = add("aesthetic", "sac+logos+ava1-l14-linearMSE.pth of improved-aesthetic-predictor", _from_aesthetic_options)
    kind.add_argument("--clip", type=user_path, required=True, help="directory of openai/clip-vit-large-patch14")
    kind = add("image_reward", "ImageReward.pt of THUDM/ImageReward", _from_image_reward_options)
    kind.add_argument(
        "--tokenizer", type=user_path, required=True, help="a directory with bert-base-uncased's vocab.txt"
    )
    _add_architecture(kind, "ImageReward-v1.0")
    return parser


def convert_hps(checkpoint: Path, out: Path, version: str, tokenizer: Path, settings: dict[str, Any]) -> Scorer:
    """Convert HPSv2.0 or 2.1: a training checkpoint {"state_dict": open_clip's tensors, ...}, or the tensors alone."""
    content = _read_checkpoint(checkpoint)
    state = _tensors(content.get("state_dict", content), checkpoint, "an HPSv2 checkpoint")

    def write(directory: Path) -> None:
        _write_settings(directory, {"hps_version": version} | settings)
        _write_weights(directory / hps.WEIGHTS_FILE, state)
        _copy_tokenizer(tokenizer, directory)

    return _publish(out, hps.HpsScorer, write)


def convert_aesthetic(checkpoint: Path, out: Path, clip: Path) -> Scorer:
    """Convert the predictor's head and store it with the vision tower of the CLIP it was trained on."""
    state = _tensors(_read_checkpoint(checkpoint), checkpoint, "a head of the aesthetic predictor")
    whole = load_pretrained(CLIPModel, clip)
    require_processor(clip, clip_processor(whole.config.vision_config.image_size))
    config = whole.config.vision_config
    config.projection_dim = whole.config.projection_dim
    vision = CLIPVisionModelWithProjection(config)
    parts = whole.state_dict()
    load_state(vision, {name: parts[name] for name in parts if name.startswith(("vision_model.", "visual_"))}, clip)

    def write(directory: Path) -> None:
        with whole_files(directory) as folder:
            vision.save_pretrained(folder)
        _write_weights(directory / aesthetic.HEAD_FILE, state)

    return _publish(out, aesthetic.AestheticScorer, write)


def convert_image_reward(checkpoint: Path, out: Path, tokenizer: Path, settings: dict[str, Any]) -> Scorer:
    """Convert ImageReward-v1.0: one state dict, renamed to transformers' BLIP."""
    published = _tensors(_read_checkpoint(checkpoint), checkpoint, "an ImageReward checkpoint")
    state = image_reward_state(published, checkpoint)

    def write(directory: Path) -> None:
        _write_settings(directory, settings)
        _write_weights(directory / image_reward.WEIGHTS_FILE, state)
        _copy_tokenizer(tokenizer, directory)

    return _publish(out, image_reward.ImageRewardScorer, write)


def _from_hps_options(options: argparse.Namespace) -> Scorer:
    settings = _architecture(options.architecture, HPS_SETTINGS)
    return convert_hps(options.checkpoint, options.out, options.version, options.tokenizer, settings)


def _from_aesthetic_options(options: argparse.Namespace) -> Scorer:
    return convert_aesthetic(options.checkpoint, options.out, options.clip)


def _from_image_reward_options(options: argparse.Namespace) -> Scorer:
    settings = _architecture(options.architecture, IMAGE_REWARD_SETTINGS)
    return convert_image_reward(options.checkpoint, options.out, options.tokenizer, settings)


def _add_architecture(parser: argparse.ArgumentParser, published: str) -> None:
    message = f"config.json of a model of another size (default: that of {published})"
    parser.add_argument("--architecture", type=user_path, metavar="FILE", help=message)


def _architecture(path: Path | None, published: dict[str, Any]) -> dict[str, Any]:
    return published if path is None else read_settings(path)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict that torch saved in `path`, or the tensors of a safetensors file. No code in the file is executed."""
    try:
        if git_lfs.is_pointer(path):
            raise ModelError(f"{path} {git_lfs.REMEDY}")
        if path.suffix == SAFETENSORS:
            return dict(read_weights(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except ModelError:
        raise
    except Exception as error:  # torch raises many kinds of errors for a truncated or foreign file
        raise ModelError(
            f"{path} is corrupt, or holds more than tensors, which could run code when opened; "
            f"take the published file ({shorten(error)})"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not named tensors: take the published file")
    return content


def _tensors(state: object, checkpoint: Path, kind: str) -> State:
    """`state` as contiguous tensors that share no memory, as safetensors requires, see `unwrapped`."""
    if not isinstance(state, dict) or not state or not all(isinstance(part, torch.Tensor) for part in state.values()):
        raise ModelError(f"{checkpoint} is not {kind}: it holds no named tensors where they should be")
    return unwrapped({str(name): tensor.detach().clone().contiguous() for name, tensor in state.items()})


def _publish(out: Path, scorer_class: type[Scorer], write: Callable[[Path], None]) -> Scorer:
    """Let `write` fill a temporary directory; rename it to `out` if the scorer loads from it and scores an image."""
    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another directory, or remove it first")
    directory = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        directory.mkdir(parents=True)
        write(directory)
        scorer = _load(scorer_class, directory)
        _check(scorer)
        directory.rename(out)
    except OSError as error:
        # The temporary directory is removed by the time this message is read.
        reason = system_error(error, out).replace(str(directory), str(out))
        raise ModelError(f"the conversion failed: {reason}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return scorer


def _load(scorer_class: type[Scorer], directory: Path) -> Scorer:
    try:
        return scorer_class.load(directory, "cpu")
    except ModelError as error:
        # The temporary directory is removed by the time this message is read.
        reason = str(error).replace(str(directory), "what was converted")
        raise ModelError(f"{reason}; is the checkpoint of another size than the published one?") from error


def _check(scorer: Scorer) -> None:
    test = scorer.check_request()
    score = float(scorer.score(test.images_BHWC, test.prompts, test.metadata)[0])
    if not math.isfinite(score):
        raise ModelError(f"the converted {scorer.name} scores a grey picture {score}: its weights are damaged")


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _write_weights(path: Path, state: State) -> None:
    with whole_files(path.parent) as folder:
        save_file(state, folder / path.name, metadata={"format": "pt"})


def _copy_tokenizer(source: Path, directory: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ModelError(f"--tokenizer {source} holds none of {', '.join(TOKENIZER_FILES)}")
    for path in found:
        shutil.copyfile(path, directory / path.name)


if __name__ == "__main__":
    sys.exit(main())
