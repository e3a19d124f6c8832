"""LoRA files of other programs: their tensors, renamed as ours, and the scale of each layer.

    peft        adapter_model.safetensors beside adapter_config.json, as RTDMD's authors write it into
                checkpoint-N/transformer, and their generator_ema.pt: LAYER.lora_A[.ADAPTER].weight
    diffusers   pytorch_lora_weights.safetensors: transformer.LAYER.lora_A.weight, the scale in its metadata or `.alpha`
    others      Kohya, XLabs, ai-toolkit: what diffusers' own loader of the model's family converts

An update is scale B A with scale = alpha / rank (peft: alpha / sqrt(rank) with `use_rslora`). Every tensor is used, or
the file is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from common import git_lfs
from common.backbones.lora_targets import adapted_layers
from common.errors import ConfigError, ModelError, one_line
from common.weight_names import ADAPTER_CONFIG, WRAPPERS
from learner.tools.lora_sources import SETTINGS
from learner.training.lora_file import LORA_PREFIX

State = dict[str, Tensor]
Convert = Callable[[Mapping[str, Tensor]], State]
"""Renames the tensors of another program's file to those of diffusers, as far as it knows them."""

PEFT_FILE = "adapter_model"
"""Files that peft saves have names that begin with this."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
PREFIX = re.compile(f"^(?:{'|'.join(map(re.escape, (*WRAPPERS, 'base_model.model.', LORA_PREFIX)))})+")
"""Prefixes of training wrappers, of peft and of diffusers before a layer's path."""
FOREIGN = ("diffusion_model.",)
"""Prefixes of programs that name the layers in their own way, though they end as peft's do."""
ALPHA, DORA = ".alpha", "dora_scale"
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of peft that subtract from the base what the adapter starts with."""
METADATA = "lora_adapter_metadata"
"""diffusers writes rank and alpha as JSON into this entry of a file's metadata."""


@dataclass(frozen=True)
class ForeignLora:
    """One adapter.

    Attributes:
        file: the file that it is from.
        state: LAYER.lora_A.weight [rank, in] and LAYER.lora_B.weight [out, rank], float32, without the scale.
        scales: layer -> its scale.
        base: name of the model that the file says it was trained on; "" if it does not say.
        states_scale: whether the scales are the file's own.
    """

    file: Path
    state: State
    scales: Mapping[str, float]
    base: str
    states_scale: bool

    def scaled(self, scale: float) -> State:
        """The same update for a network whose adapters all have this scale: B is multiplied."""
        factors = {layer: own / scale for layer, own in self.scales.items()}
        return {
            key: value * factors[key.removesuffix(".lora_B.weight")] if key.endswith(".lora_B.weight") else value
            for key, value in self.state.items()
        }


@dataclass(frozen=True)
class Scaling:
    """Rank and alpha as peft and diffusers write them; the patterns are those of layers with values of their own."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Scaling:
        """Of peft's settings.

        Raises:
            ModelError: they lack rank or alpha, or describe more than a plain LoRA.
        """
        for key, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("fan_in_fan_out", False)):
            if settings.get(key) not in (plain, None):
                raise ModelError(f"{where} has {key} = {settings[key]}: only a plain LoRA can be imported")
        if str(settings.get("init_lora_weights")).lower().startswith(CHANGES_THE_BASE):
            raise ModelError(
                f"{where} has init_lora_weights = {settings['init_lora_weights']}: its base was changed as well: "
                "convert it to a plain LoRA with peft"
            )
        if settings.get("peft_type", "LORA") != "LORA":
            raise ModelError(f"{where} is of a {settings['peft_type']}: only a plain LoRA can be imported")
        try:
            rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{where} has no usable r and lora_alpha: {error!r}") from error
        patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
        return cls(rank, alpha, **patterns, rslora=bool(settings.get("use_rslora", False)))

    def scale(self, layer: str, rank: int, where: str) -> float:
        """The scale of a layer whose A has `rank` rows.

        Raises:
            ModelError: its rank is another one.
        """
        expected = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.rank)
        if rank != expected:
            raise ModelError(
                f"{where} says rank {expected} of {layer}, its weights have {rank}: take both from one save"
            )
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_lora(file: Path, convert: Convert, alpha: float | None = None) -> ForeignLora:
    """Read one file; `alpha` is that of a file that does not state its own.

    Raises:
        ModelError: it is no LoRA, is damaged or pickled code, or has a tensor that cannot be used; its name is given.
        ConfigError: neither the file nor `alpha` states the scale.
    """
    tensors, metadata = _tensors(file)
    settings = _settings(file)
    doubtful = next((name for name in sorted(tensors) if DORA in name), None)
    if doubtful is not None:
        raise ModelError(f"{file}: {doubtful}: it is a DoRA: only a plain LoRA can be imported")
    alphas = {PREFIX.sub("", name.removesuffix(ALPHA)): value for name, value in tensors.items() if _is_alpha(name)}
    weights = {name: value for name, value in tensors.items() if not _is_alpha(name)}
    own_names = all(_layer_name(name) and not name.startswith(FOREIGN) for name in weights)
    if not own_names:  # diffusers converts the scale as well
        weights, alphas, alpha = _converted(file, tensors, convert), {}, None
    state = _renamed(file, weights)
    described = settings or _of_metadata(file, metadata)
    scales = _scales(file, state, settings, described, alphas, alpha)
    states_scale = bool(described or alphas or not own_names)
    return ForeignLora(file, state, scales, str(settings.get("base_model_name_or_path") or ""), states_scale)


def _is_alpha(name: str) -> bool:
    return name.endswith(ALPHA)


def _layer_name(name: str) -> re.Match[str] | None:
    return NAME.fullmatch(PREFIX.sub("", name))


def _tensors(file: Path) -> tuple[State, Mapping[str, str]]:
    """The file's tensors and metadata. A pickled file is read as tensors and plain containers alone."""
    try:
        if git_lfs.is_pointer(file):
            raise ModelError(f"{file} {git_lfs.REMEDY}")
        if file.suffix not in PICKLED:
            with safe_open(file, "pt") as header:
                metadata = header.metadata() or {}
            return load_file(file), metadata
        # RTDMD's authors publish this format too. torch refuses whatever could run code, before it runs.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # both libraries raise many kinds of errors for a truncated or foreign file
        raise ModelError(
            f"{file} cannot be read as tensors: {one_line(error, 200)}; take a .safetensors file, or the published one"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{file} holds more than named tensors: name the file of the adapter itself")
    return {str(name): value for name, value in content.items()}, {}


def _settings(file: Path) -> dict[str, Any]:
    """peft's settings beside the file, or in the folder that the authors write beside it; empty if there are none.

    They are those of peft's own files and of pickled ones. Another file beside them is not theirs.
    """
    if file.suffix not in PICKLED and not file.name.startswith(PEFT_FILE):
        return {}
    path = next((file.parent / place for place in SETTINGS if (file.parent / place).is_file()), None)
    if path is None:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error!r}") from error


def _of_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = dict(json.loads(metadata.get(METADATA, "{}")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: its {METADATA} is damaged: {error!r}") from error
    return {key.removeprefix(LORA_PREFIX): value for key, value in values.items() if key.startswith(LORA_PREFIX)}


def _converted(file: Path, tensors: State, convert: Convert) -> State:
    try:
        return convert(tensors)
    except Exception as error:  # each converter of diffusers raises its own kinds for names that it does not know
        raise ModelError(f"{file}: diffusers cannot convert its names: {one_line(error, 200)}") from error


def _renamed(file: Path, weights: Mapping[str, Tensor]) -> State:
    """The tensors under our names."""
    adapters: set[str] = set()
    state: State = {}
    for name, value in weights.items():
        match = _layer_name(name)
        if match is None:
            raise ModelError(
                f"{file}: {name} is no weight of a LoRA that is known here: expected LAYER.lora_A.weight and "
                ".lora_B.weight (peft, diffusers), or what diffusers converts for this family"
            )
        key = f"{match['layer']}.lora_{match['part']}.weight"
        adapters.add(match["adapter"] or "")
        if len(adapters) > 1:
            raise ModelError(f"{file} holds several adapters, {sorted(adapters)}: save each into a file of its own")
        if key in state:
            raise ModelError(f"{file}: {name} is in it twice, with and without a prefix")
        if value.ndim != 2 or not value.is_floating_point() or not value.isfinite().all():
            raise ModelError(
                f"{file}: {name} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}: expected a finite "
                "matrix"
            )
        state[key] = value.float()
    if not state:
        raise ModelError(f"{file} has no weights: name the file of a LoRA")
    _require_pairs(file, state)
    return state


def _require_pairs(file: Path, state: Mapping[str, Tensor]) -> None:
    for layer in adapted_layers(state):
        shapes = [list(state[key].shape) if key in state else None for key in _keys(layer)]
        if None in shapes:
            raise ModelError(f"{file}: {layer} has only one of lora_A and lora_B: take a complete file")
        (rank, _), (_, columns) = shapes[0] or [0, 0], shapes[1] or [0, 0]
        if rank != columns or not rank:
            raise ModelError(f"{file}: {layer}: its A is {shapes[0]} and its B {shapes[1]}, which are not of one rank")


def _keys(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def _scales(
    file: Path,
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    described: Mapping[str, Any],
    alphas: Mapping[str, Tensor],
    alpha: float | None,
) -> dict[str, float]:
    """The scale of each layer: `described` by peft's settings or diffusers' metadata, else `.alpha`, `alpha`, or 1."""
    ranks = {layer: state[_keys(layer)[0]].shape[0] for layer in adapted_layers(state)}
    stray = sorted(alphas.keys() - ranks.keys())
    if stray:
        raise ModelError(f"{file}: {stray[0]}{ALPHA} is of a layer without weights: take a complete file")
    if described:
        where = f"{ADAPTER_CONFIG} of {file}" if settings else f"{METADATA} of {file}"
        scaling = Scaling.of(described, where)
        return {layer: scaling.scale(layer, rank, where) for layer, rank in ranks.items()}
    if alphas:
        own = {layer: float(value) for layer, value in alphas.items()}
        return {layer: own.get(layer, float(rank)) / rank for layer, rank in ranks.items()}
    if alpha is not None:
        return {layer: alpha / rank for layer, rank in ranks.items()}
    if file.suffix in PICKLED or file.name.startswith(PEFT_FILE):
        raise ConfigError(
            f"{file} does not state its scale, and there is no {ADAPTER_CONFIG} beside it: name its lora_alpha with "
            "--alpha N (RTDMD's authors: 64, of rank 32)"
        )
    return dict.fromkeys(ranks, 1.0)
