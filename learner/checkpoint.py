"""Checkpoints: written whole or not at all, refused when damaged, and enough to go on exactly where they stopped.

    checkpoints/alignment-000050/state.safetensors     every tensor that training changes
    checkpoints/alignment-000050/checkpoint.json       stage, iterations done, hash of the state, settings it depends on

Random draws are functions of the iteration (`common/seeding.py`), so there is no generator state to keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load, save
from torch import Tensor

from common.errors import CheckpointError
from common.types import Position, Stage

LAYOUT = 2
"""What a state holds and how training goes on from it. 1: one fake-score adapter in both stages; the student trained on
the fake score's own samples, and was averaged only after its updates."""
_NAME = re.compile(rf"({'|'.join(Stage)})-(\d{{6,}})")


def write_checkpoint(
    root: Path, position: Position, state: Mapping[str, Tensor], settings: Mapping[str, Any], base: str = ""
) -> Path:
    """Write one checkpoint under `root`, atomically: a crash leaves the one before in place.

    `base` is the fingerprint of the frozen model that the state belongs to.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); what was half written is removed.
    """
    final, partial = root / position.directory, root / f".{position.directory}.partial"
    payload = save(dict(state))
    about = {**asdict(position), "xxh3": xxhash.xxh3_128_hexdigest(payload), "settings": settings, "base": base}
    about["layout"] = LAYOUT
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_durably(partial / "state.safetensors", payload)
        _write_durably(partial / "checkpoint.json", json.dumps(about, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        _sync(partial)
        partial.rename(final)
        _sync(root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error.strerror}; free space and use --resume"
        ) from error
    return final


def read_checkpoint(
    directory: Path, settings: Mapping[str, Any] | None = None, base: str | None = None
) -> tuple[Position, dict[str, Tensor]]:
    """Read one checkpoint; with `settings` or `base`, only if it was made under the same settings, on the same base.

    Raises:
        CheckpointError: it is missing, damaged, or of a run with other settings (the first difference is named),
            another frozen model or, with `settings`, an earlier layout.
    """
    try:
        about = json.loads((directory / "checkpoint.json").read_text())
        payload = (directory / "state.safetensors").read_bytes()
        position, digest, made_under = (
            Position(Stage(about["stage"]), about["iteration"]),
            about["xxh3"],
            about["settings"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} is not a checkpoint: {error!r}; remove it to resume from the one before"
        ) from error
    if xxhash.xxh3_128_hexdigest(payload) != digest:
        raise CheckpointError(
            f"checkpoint {directory} is damaged (hash differs); remove it to resume from the one before"
        )
    if settings is not None and about.get("layout", 1) != LAYOUT:
        raise CheckpointError(
            f"checkpoint {directory} was written by an earlier version, whose training this one cannot continue: "
            "resume it with that version, or start another run from its cold start (--cold_start.from_checkpoint)"
        )
    if settings is not None:
        difference = _first_difference(made_under, settings)
        if difference:
            raise CheckpointError(
                f"checkpoint {directory} is of a run with another {difference}; use another --run-dir"
            )
    if base is not None and about.get("base") != base:
        raise CheckpointError(
            f"checkpoint {directory} was trained on another base model than the one at backbone.path: restore that "
            "model's files, or use another --run-dir"
        )
    return position, load(payload)


def checkpoint_base(directory: Path) -> str:
    """The fingerprint of the frozen model that a checkpoint, known to be whole, says it belongs to."""
    return str(json.loads((directory / "checkpoint.json").read_text()).get("base", ""))


def checkpoint_settings(directory: Path) -> dict[str, Any]:
    """The settings a checkpoint says it was made under; empty when it does not (`read_checkpoint` refuses it)."""
    try:
        settings: dict[str, Any] = dict(json.loads((directory / "checkpoint.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings


def latest_checkpoint(root: Path) -> Path | None:
    """The furthest checkpoint under `root`, or None."""
    found = [(Position(Stage(match[1]), int(match[2])), path) for path, match in _checkpoints(root)]
    return max(found)[1] if found else None


def prune_checkpoints(root: Path, stage: Stage, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a stage."""
    mine = sorted((int(match[2]), path) for path, match in _checkpoints(root) if match[1] == stage)
    for _, path in mine[:-keep]:
        shutil.rmtree(path)


def _checkpoints(root: Path) -> list[tuple[Path, re.Match[str]]]:
    if not root.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in root.iterdir()]
    return [(path, match) for path, match in matches if match is not None]


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = _first_difference(before, after, f"{prefix}{key}.")
            if inner:
                return inner
        elif before != after:
            return f"{prefix}{key} ({before!r}, now {after!r})"
    return None
