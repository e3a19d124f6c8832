"""Finds a diffusers pipeline and checks its small files, before minutes are spent on its large ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import safe_open

from common.errors import ModelError

INDEX = "model_index.json"
LICENCES = "LICENSE*"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHT_FILES = "*.safetensors"
WEIGHTED_PARTS = ("transformer", "text_encoder", "vae")
HUB_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*")
"""A repository may hold second copies of its weights under these names."""


class PartConfig(dict[str, Any]):
    """A part's configuration in which a missing key is a ModelError."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        super().__init__(values)
        self._source = source

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"{self._source} has no {key}: it is damaged, or of another model")


@dataclass(frozen=True)
class PipelineFiles:
    """A pipeline that is complete as far as its small files show.

    Attributes:
        path: the path in the run file.
        directory: the local directory of its files.
        kind: the pipeline's class.
        index: its model_index.json.
        parts: the folders of it that are needed.
    """

    path: Path
    directory: Path
    kind: str
    index: dict[str, Any]
    parts: tuple[str, ...]

    @property
    def of_hub(self) -> bool:
        return self.directory != self.path

    def fetch_weights(self) -> None:
        """Download the weights, unless they exist locally.

        Raises:
            ModelError: the hub does not provide them, or a file is missing or truncated.
        """
        if self.of_hub:
            _fetch(self.path, [f"{part}/{WEIGHT_FILES}" for part in self.parts])
        for part in self.parts:
            _require_whole_weights(self, part)

    def weight_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of a part, from the headers of its files; from the hub if they are not local.

        Raises:
            ModelError: the hub does not provide them, or a file is missing or truncated.
        """
        if self.of_hub and not _has_weights(self, part):
            return _shapes_on_hub(self.path, part)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in (self.directory / part).glob(WEIGHT_FILES):
            with safe_open(file, "pt") as header:
                shapes |= {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
        return shapes

    def config(self, part: str) -> PartConfig:
        """Read the configuration of a part.

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
    """Find a local directory, or ORGANISATION/NAME on the hub, whose small files are downloaded unless they are local.

    `only` names the single part that is needed; None means all.

    Raises:
        ModelError: there is no pipeline, its kind is not in `kinds`, or a file is missing or, in a directory,
            truncated.
    """
    directory = path if path.exists() else _fetch(path, (INDEX,))
    files = _read_index(path, directory, only)
    if files.kind not in kinds:
        raise ModelError(f"{path} holds a {files.kind}, but family {family} needs a {' or '.join(kinds)}")
    if files.of_hub:
        _fetch(path, [LICENCES, *(f"{part}/{pattern}" for part in files.parts for pattern in SMALL_FILES)])
    missing = [part for part in files.parts if not (directory / part).is_dir()]
    if missing:
        raise files.broken(f"there is no {', '.join(missing)} in it")
    if not files.of_hub:
        files.fetch_weights()
    return files


def _read_index(path: Path, directory: Path, only: str | None) -> PipelineFiles:
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        parts = (only,) if only else tuple(name for name, value in index.items() if _is_part(value))
        return PipelineFiles(path, directory, index["_class_name"], index, parts)
    except OSError as error:
        raise ModelError(f"no pipeline at {path}: expected a diffusers directory with a {INDEX}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot load the pipeline at {path}: {INDEX} is damaged: {error!r}") from error


def _fetch(path: Path, patterns: Sequence[str]) -> Path:
    """Download the hub's files that match the patterns; return their directory."""
    if path.is_absolute() or len(path.parts) != 2:
        raise ModelError(f"no pipeline at {path}: expected a diffusers directory with a {INDEX}")
    try:
        if tuple(patterns) == (INDEX,):
            return Path(hf_hub_download(str(path), INDEX)).parent
        return Path(snapshot_download(str(path), allow_patterns=list(patterns), ignore_patterns=list(HUB_VARIANTS)))
    except Exception as error:  # the hub's client raises a different class for each kind of failed download
        raise _not_given(path, error) from error


def _not_given(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"no pipeline at {path}: there is no such directory, and the hub does not give it: {first_line(error)}; "
        "check the name, log in where it is gated, or set backbone.path to a directory"
    )


def _shapes_on_hub(path: Path, part: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    hub = HfApi()
    try:
        for name in hub.list_repo_files(str(path)):
            if fnmatch(name, f"{part}/{WEIGHT_FILES}") and not any(fnmatch(name, variant) for variant in HUB_VARIANTS):
                header = hub.parse_safetensors_file_metadata(str(path), name)
                shapes |= {key: tuple(tensor.shape) for key, tensor in header.tensors.items()}
    except Exception as error:  # see _fetch
        raise _not_given(path, error) from error
    if not shapes:
        raise ModelError(f"cannot load the pipeline at {path}: there is no {part}/{WEIGHT_FILES} in it")
    return shapes


def _is_part(value: object) -> bool:
    """Whether an index entry is a part: [library, class]; parts left out on purpose are [null, null]."""
    return isinstance(value, list) and None not in value


def _has_weights(files: PipelineFiles, part: str) -> bool:
    try:
        _require_whole_weights(files, part)
    except ModelError:
        return False
    return True


def _require_whole_weights(files: PipelineFiles, part: str) -> None:
    """ModelError unless the weights exist, with every shard of an index, and every file has its header's length."""
    folder = files.directory / part
    if part.startswith(WEIGHTED_PARTS) and not any(folder.glob(WEIGHT_FILES)):
        raise files.broken(f"there is no {part}/{WEIGHT_FILES} in it")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise files.broken(f"{part}/{index.name} is damaged: {error!r}") from error
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise files.broken(f"there is no {part}/{missing[0]} in it, which {index.name} names")
    for file in folder.glob(WEIGHT_FILES):
        size = file.stat().st_size
        if size != _declared_size(file):
            raise files.broken(f"{part}/{file.name} is damaged: {size} bytes, not what its header says")


def _declared_size(file: Path) -> int:
    """Bytes of a safetensors file: 8 for the header's length, the header, the last end of a tensor; -1 if invalid."""
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
    """The first line of another library's exception, for use in our messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
