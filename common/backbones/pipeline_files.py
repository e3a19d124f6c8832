"""Finding a diffusers pipeline and checking it by its small files, before minutes are spent on its large ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from common.errors import ModelError

INDEX = "model_index.json"
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*")
"""Weights that a repository holds a second time."""


class PartConfig(dict[str, Any]):
    """A part's configuration, in which a key that is looked up must be."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        super().__init__(values)
        self._source = source

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"{self._source} has no {key}: it is damaged, or of another model")


@dataclass(frozen=True)
class PipelineFiles:
    """A pipeline that is whole as far as its small files can tell.

    Attributes:
        path: as the run file has it.
        directory: where its files are.
        kind: the pipeline's class.
        index: its model_index.json.
    """

    path: Path
    directory: Path
    kind: str
    index: dict[str, Any]

    def config(self, part: str) -> PartConfig:
        """The configuration of a part.

        Raises:
            ModelError: it is missing or damaged.
        """
        kind = part.rstrip("_0123456789")
        file = self.directory / part / (f"{kind}_config.json" if kind in ("scheduler", "tokenizer") else "config.json")
        try:
            return PartConfig(dict(json.loads(file.read_text(encoding="utf-8"))), str(file))
        except (OSError, ValueError, TypeError) as error:
            raise self.broken(f"{part}/{file.name} is missing or damaged: {error}") from error

    def broken(self, reason: str) -> ModelError:
        return ModelError(f"cannot load the pipeline at {self.path}: {reason}")


def find_pipeline(path: Path, family: str, kinds: Sequence[str], only: str | None = None) -> PipelineFiles:
    """A local directory, or ORGANISATION/NAME of the hub, whose files are fetched where they are not at hand.

    `only` names the one part that is needed, if not all are.

    Raises:
        ModelError: there is none, its kind is none of `kinds`, or a file is missing or cut short.
    """
    directory = path if path.exists() else _fetch(path, (INDEX,))
    files = _read_index(path, directory)
    if files.kind not in kinds:
        raise ModelError(f"{path} holds a {files.kind}, but family {family} needs a {' or '.join(kinds)}")
    parts = [only] if only else [name for name, value in files.index.items() if _is_part(value)]
    if directory != path:
        _fetch(path, [f"{part}/{pattern}" for part in parts for pattern in HUB_PATTERNS])
    missing = [part for part in parts if not (directory / part).is_dir()]
    if missing:
        raise files.broken(f"there is no {', '.join(missing)} in it")
    for part in parts:
        _require_whole_weights(files, part)
    return files


def _read_index(path: Path, directory: Path) -> PipelineFiles:
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        return PipelineFiles(path, directory, index["_class_name"], index)
    except OSError as error:
        raise ModelError(f"no pipeline at {path}: expected a diffusers directory with a {INDEX}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load the pipeline at {path}: {INDEX} is damaged: {error!r}") from error


def _fetch(path: Path, patterns: Sequence[str]) -> Path:
    """The hub's files that match, and the directory they are in."""
    if path.is_absolute() or len(path.parts) != 2:
        raise ModelError(f"no pipeline at {path}: expected a diffusers directory with a {INDEX}")
    try:
        if tuple(patterns) == (INDEX,):
            return Path(hf_hub_download(str(path), INDEX)).parent
        return Path(snapshot_download(str(path), allow_patterns=list(patterns), ignore_patterns=list(HUB_VARIANTS)))
    except Exception as error:  # the hub's client raises a different class for every way a download can fail
        raise ModelError(
            f"no pipeline at {path}: there is no such directory, and the hub does not give it: {first_line(error)}; "
            "check the name, log in where it is gated, or set backbone.path to a directory"
        ) from error


def _is_part(value: object) -> bool:
    """Parts stand in the index as [library, class]; those left out on purpose as [null, null]."""
    return isinstance(value, list) and None not in value


def _require_whole_weights(files: PipelineFiles, part: str) -> None:
    """Every shard that an index names is there, and every weight file as long as its header says."""
    folder = files.directory / part
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise files.broken(f"{part}/{index.name} is damaged: {error!r}") from error
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise files.broken(f"there is no {part}/{missing[0]} in it, which {index.name} names")
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        if size != _declared_size(file):
            raise files.broken(f"{part}/{file.name} is damaged: {size} bytes, not what its header says")


def _declared_size(file: Path) -> int:
    """Bytes of a safetensors file: 8 for the header's length, the header, the furthest end of a tensor; -1 if none."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return 8 + length
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return -1
    return 8 + length + max(ends, default=0)


def first_line(error: Exception) -> str:
    """What another library's exception says, short enough for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
