"""Finds a diffusers pipeline and checks its small files and headers, before minutes are spent on its large files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import safe_open

from common.backbones.files.weight_files import (
    OWN_NAME,
    WEIGHT_FILES,
    fault,
    own_files,
    quantised_reason,
    read_files,
    without_weights,
)
from common.errors import ModelError
from common.hub_errors import not_given
from common.weight_names import (
    ADAPTER_BESIDE,
    ADAPTER_CONFIG,
    PLAIN,
    VARIANTS,
    common_variant,
    usable_variants,
    variant_of,
)

INDEX = "model_index.json"
CONFIG = "config.json"
LICENCES = "LICENSE*"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTED_PARTS = ("transformer", "text_encoder", "vae")
SECOND_COPIES = tuple(pattern for variant in (*VARIANTS, "non_ema") for pattern in (f"*.{variant}.*", f"*.{variant}-*"))
"""A repository may hold second copies of its weights under these names. They are downloaded if there is no first."""


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

    @property
    def variant(self) -> str | None:
        """The `variant` with which diffusers reads the weights, because a part has no plain copy of them; else None."""
        folders = [self.directory / part for part in self.parts]
        names = [[file.name for file in own_files(folder)] for folder in folders]
        return common_variant([usable_variants(found) for found in names]) or None

    def variant_of(self, part: str) -> str | None:
        """The variant of one part's weights: the pipeline's, if the part has it."""
        found = {variant_of(file.name) for file in self.weight_files(part)}
        return self.variant if self.variant in found else None

    def fetch_weights(self) -> None:
        """Download the weights, unless they exist locally.

        Raises:
            ModelError: the hub does not provide them, or they cannot be used, see `require_usable_weights`.
        """
        if self.of_hub:
            _fetch(self.path, [f"{part}/{WEIGHT_FILES}" for part in self.parts])
            unread = [part for part in self.parts if self._lacks_weights(part)]
            if unread:
                copies = [
                    f"{part}/{pattern}" for part in unread for pattern in (WEIGHT_FILES, f"{WEIGHT_FILES}.*.json")
                ]
                _fetch(self.path, copies, without=())
        for part in self.parts:
            if self._lacks_weights(part):
                raise self.broken(without_weights(self.directory / part))
        self.require_usable_weights()

    def require_usable_weights(self) -> None:
        """Refuse weights that cannot be used as they are.

        Raises:
            ModelError: a file is missing, truncated, quantised or pickled, or has a LoRA or a wrapper's prefix.
        """
        for part in self.parts:
            if not self.has_safetensors(part) and any((self.directory / part).glob("*.bin")):
                raise self.broken(without_weights(self.directory / part))
            if reason := fault(self.directory / part, self._copy):
                raise self.broken(reason)

    @property
    def _copy(self) -> str:
        return self.variant or PLAIN

    def weight_files(self, part: str) -> list[Path]:
        """The files of a part's weights that loading reads."""
        return read_files(self.directory / part, self._copy)

    def has_safetensors(self, part: str) -> bool:
        return bool(self.weight_files(part))

    def _lacks_weights(self, part: str) -> bool:
        return part.startswith(WEIGHTED_PARTS) and not self.has_safetensors(part)

    def weight_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of a part, from the headers of its files; from the hub if they are not local.

        Raises:
            ModelError: the hub does not provide them, or a file is missing or truncated.
        """
        folder = self.directory / part
        if self.of_hub and (self._lacks_weights(part) or fault(folder, self._copy)):
            return _shapes_on_hub(self.path, part)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in read_files(folder, self._copy):
            with safe_open(file, "pt") as header:
                shapes |= {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
        return shapes

    def config(self, part: str) -> PartConfig:
        """Read the configuration of a part.

        Raises:
            ModelError: it is missing or damaged.
        """
        kind = part.rstrip("_0123456789")
        file = self.directory / part / (f"{kind}_config.json" if kind in ("scheduler", "tokenizer") else CONFIG)
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
    files = read_index(path, find_index(path), only)
    if files.kind not in kinds:
        raise ModelError(f"{path} holds a {files.kind}, but family {family} needs a {' or '.join(kinds)}")
    if files.of_hub:
        _fetch(path, [LICENCES, *(f"{part}/{pattern}" for part in files.parts for pattern in SMALL_FILES)])
    require_parts_alone(files)
    if not files.of_hub:
        files.fetch_weights()
    return files


def find_index(path: Path) -> Path:
    """The local directory of a pipeline's index, which is downloaded unless it is local. It may not be one.

    Raises:
        ModelError: there is no such directory, and the hub does not give it.
    """
    return path if path.exists() else _fetch(path, (INDEX,))


def read_index(path: Path, directory: Path, only: str | None = None) -> PipelineFiles:
    """Read the index of a pipeline of any kind.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        parts = (only,) if only else tuple(name for name, value in index.items() if name[0] != "_" and _is_part(value))
        kind = index["_class_name"]
        if isinstance(kind, str):
            return PipelineFiles(path, directory, kind, index, parts)
    except OSError as error:
        raise _no_pipeline(path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot load the pipeline at {path}: {INDEX} is damaged: {error!r}") from error
    raise ModelError(
        f"cannot load the pipeline at {path}: its {INDEX} has _class_name = {kind}: only diffusers' own pipelines are "
        "supported, not the code of a community pipeline: save it as a class of diffusers"
    )


def require_parts_alone(files: PipelineFiles) -> None:
    """Refuse parts that are not there, or are not what their weights alone say.

    Raises:
        ModelError: a part has no folder, an adapter beside its weights, or a configuration that says it is quantised.
    """
    missing = [part for part in files.parts if not (files.directory / part).is_dir()]
    if missing:
        raise files.broken(
            f"there is no {', '.join(missing)} in it: download it, or set parts that the model can do without to "
            f"[null, null] in {INDEX}"
        )
    for part in files.parts:
        if (files.directory / part / ADAPTER_CONFIG).exists():
            raise files.broken(f"its {part} has {ADAPTER_BESIDE}")
        if part.startswith(WEIGHTED_PARTS) or (files.directory / part / CONFIG).is_file():
            _require_unquantised(files, part)


def _require_unquantised(files: PipelineFiles, part: str) -> None:
    """ModelError if a part's configuration says that its weights are quantised."""
    if settings := files.config(part).get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise files.broken(quantised_reason(part, f"quantization_config.quant_method = {method}"))


def _fetch(path: Path, patterns: Sequence[str], without: Sequence[str] = SECOND_COPIES) -> Path:
    """Download the hub's files that match the patterns, but not `without`; return their directory."""
    if path.is_absolute() or len(path.parts) != 2:
        raise _no_pipeline(path)
    try:
        if tuple(patterns) == (INDEX,):
            return Path(hf_hub_download(str(path), INDEX)).parent
        return Path(snapshot_download(str(path), allow_patterns=list(patterns), ignore_patterns=list(without)))
    except Exception as error:  # the hub's client raises a different class for each kind of failed download
        raise _not_given(path, error) from error


def _no_pipeline(path: Path) -> ModelError:
    """The error for a path that is no pipeline's directory; it names the one that was probably meant."""
    reason = f"no pipeline at {path}: expected a diffusers directory with a {INDEX}"
    if path.is_file() and path.name != INDEX:
        return ModelError(f"{reason}, not a file: convert it with diffusers' from_single_file and save_pretrained")
    inside = sorted(path.glob(f"*/{INDEX}")) + sorted(path.glob(f"snapshots/*/{INDEX}"))
    found = [index.parent for index in inside] + [path.parent] * (path.parent / INDEX).is_file()
    return ModelError(f"{reason}; there is one at {found[0]}" if found else reason)


def _not_given(path: Path, error: Exception) -> ModelError:
    reason = not_given(error, "set backbone.path to a directory")
    return ModelError(f"no pipeline at {path}: there is no such directory, and {reason}")


def _shapes_on_hub(path: Path, part: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    hub = HfApi()
    try:
        names = [name for name in hub.list_repo_files(str(path)) if OWN_NAME.fullmatch(name.removeprefix(f"{part}/"))]
        found = usable_variants(Path(name).name for name in names)
        copy = PLAIN if PLAIN in found else common_variant([found])
        for name in names:
            if variant_of(Path(name).name) == copy:
                header = hub.parse_safetensors_file_metadata(str(path), name)
                shapes |= {key: tuple(tensor.shape) for key, tensor in header.tensors.items()}
    except Exception as error:  # see _fetch
        raise _not_given(path, error) from error
    if not shapes:
        raise ModelError(f"cannot load the pipeline at {path}: there is no {part}/{WEIGHT_FILES} in it")
    return shapes


def _is_part(value: object) -> bool:
    """Whether an index entry is a part: [library, class]; a part that is left out on purpose is [null, null]."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)
