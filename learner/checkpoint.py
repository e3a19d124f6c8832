"""Checkpoints: written atomically, refused when damaged, and sufficient for an exact resume.

    checkpoints/alignment-000050/state.safetensors     every tensor that training changes
    checkpoints/alignment-000050/checkpoint.json       stage, iterations done, hash of the state, relevant settings

Only this file knows these paths. Random draws are functions of the iteration (`common/seeding.py`), so no generator
state is saved. torch is imported only where tensors are written or read: the driver verifies and prunes checkpoints
without it.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import xxhash

from common.command import system_error
from common.errors import CheckpointError, DamagedCheckpoint
from common.types import Position, Stage

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ABOUT, STATE = "checkpoint.json", "state.safetensors"
FOLDER = "checkpoints"
LAYOUT = 2
"""Version of a state's content and of the training that continues from it.

In layout 1 both stages had one fake-score adapter. The student trained on the fake score's own samples, and was
averaged only after its updates.
"""
NOT_FOR_DIRECTORIES = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that cannot sync a directory, such as some network mounts and shared folders."""
_NAME = re.compile(rf"({'|'.join(Stage)})-(\d{{6,}})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that has been verified.

    Attributes:
        settings: the settings it was made with, see `learner.driver.run_directory.continuity`.
        base: fingerprint of the frozen model that its state belongs to.
        parts: fingerprint of the pipeline's other parts; "" if unknown.
        layout: see `LAYOUT`.
    """

    directory: Path
    position: Position
    settings: Mapping[str, Any]
    base: str
    layout: int
    parts: str
    _payload: bytes = field(repr=False)

    @staticmethod
    def is_at(directory: Path) -> bool:
        """Whether there is a checkpoint, even a damaged one."""
        return (directory / ABOUT).is_file()

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read a checkpoint and verify the hash of its state.

        Raises:
            CheckpointError: it cannot be read.
            DamagedCheckpoint: it is incomplete, or its content is not what was written.
        """
        try:
            about = json.loads((directory / ABOUT).read_text())
            payload = (directory / STATE).read_bytes()
            position, layout = Position(Stage(about["stage"]), about["iteration"]), about.get("layout", 1)
            if not isinstance(position.iteration, int) or not isinstance(layout, int):
                raise TypeError("its iteration and layout are whole numbers")
            opened = cls(
                directory,
                position,
                dict(about["settings"]),
                about.get("base", ""),
                layout,
                about.get("parts", ""),
                payload,
            )
            digest = about["xxh3"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{directory} is not a checkpoint: {error!r}") from error
        except OSError as error:
            raise CheckpointError(f"{directory} is not a checkpoint: {error!r}") from error
        if xxhash.xxh3_128_hexdigest(payload) != digest:
            raise DamagedCheckpoint(f"checkpoint {directory} is damaged: its hash differs")
        return opened

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """CheckpointError unless a run with these settings can continue from here; it names the first difference."""
        if self.layout > LAYOUT:
            raise CheckpointError(
                f"checkpoint {self.directory} was written by a later version: resume it with that one"
            )
        if self.layout < LAYOUT:
            raise CheckpointError(
                f"checkpoint {self.directory} was written by an earlier version, whose training this one cannot "
                "continue: resume it with that version, or start another run from its cold start "
                "(--cold_start.from_checkpoint)"
            )
        difference = _first_difference(self.settings, settings)
        if difference:
            raise CheckpointError(
                f"checkpoint {self.directory} is of a run with another {difference}; use another --run-dir"
            )

    def require_base(self, base: str, parts: str = "") -> None:
        """CheckpointError unless its state belongs to the frozen model and the other parts with these fingerprints."""
        if self.base != base:
            raise CheckpointError(
                f"checkpoint {self.directory} was trained on another base model than the one at backbone.path: restore "
                "that model's files, or use another --run-dir"
            )

        if parts and self.parts and self.parts != parts:
            raise CheckpointError(
                f"checkpoint {self.directory} was trained with other text encoders, another VAE or another noise "
                "schedule than those at backbone.path: restore that pipeline's files, or use another --run-dir"
            )

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, on the CPU."""
        from safetensors.torch import load

        return load(self._payload)


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def of_run(cls, run_dir: Path) -> Self:
        return cls(run_dir / FOLDER)

    @staticmethod
    def run_of(checkpoint: Path) -> Path | None:
        """The run directory that contains a checkpoint, or None; the checkpoint, or its folder, may be a link."""
        paths = (Path(os.path.abspath(checkpoint)), checkpoint.resolve())
        runs = [path.parents[1] for path in paths if path.parent.name == FOLDER]
        return next((run for run in runs if (run / "config.yaml").exists()), None)

    def save(
        self,
        position: Position,
        state: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        base: str = "",
        parts: str = "",
    ) -> Path:
        """Write one checkpoint atomically: after a crash the previous one is intact.

        `base` and `parts` are the fingerprints of the frozen model and of the pipeline's other parts.

        Raises:
            CheckpointError: it cannot be written (a full disk, for example); a partial checkpoint is removed.
        """
        from safetensors.torch import save

        final, partial = self._directory(position), self.root / f".{position.directory}.partial"
        payload = save(dict(state))
        about = {
            **asdict(position),
            "xxh3": xxhash.xxh3_128_hexdigest(payload),
            "settings": settings,
            "base": base,
            "parts": parts,
            "layout": LAYOUT,
        }
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_durably(partial / STATE, payload)
            _write_durably(partial / ABOUT, json.dumps(about, indent=1).encode())
            _remove(final)
            _sync(partial)
            partial.rename(final)
            _sync(self.root)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"cannot write a checkpoint: {system_error(error, final)}") from error
        return final

    @staticmethod
    def in_order(names: Iterable[str]) -> list[str]:
        """Those that are names of checkpoints, the most advanced first."""
        found = [(position, name) for name in names if (position := _position(name))]
        return [name for _, name in sorted(found, reverse=True)]

    def exists(self, position: Position) -> bool:
        return self._directory(position).exists()

    def latest(self, stage: Stage | None = None) -> Path | None:
        """The most advanced checkpoint, of this stage if one is given, or None."""
        return next(iter(self.newest_first(stage)), None)

    def newest_first(self, stage: Stage | None = None) -> list[Path]:
        """All checkpoints, or those of a stage, the most advanced first."""
        found = [(position, path) for position, path in self._found() if stage in (None, position.stage)]
        return [path for _, path in sorted(found, reverse=True)]

    def set_aside(self, checkpoint: Path, reason: str = "damaged") -> Path:
        """Rename a checkpoint, so that nothing takes it for one; return its new path, which ends in the reason.

        Raises:
            CheckpointError: the directory cannot be written to.
        """
        names = (f"{checkpoint.name}.{reason}{number or ''}" for number in itertools.count())
        aside = next(path for path in (self.root / name for name in names) if not path.exists())
        try:
            checkpoint.rename(aside)
        except OSError as error:
            raise CheckpointError(f"cannot set a checkpoint aside: {system_error(error, checkpoint)}") from error
        return aside

    def iterations(self, stage: Stage) -> list[int]:
        """The iterations of a stage after which there is a checkpoint, in order."""
        return sorted(position.iteration for position, _ in self._found() if position.stage is stage)

    def set_aside_after(self, position: Position, reason: str) -> int:
        """`set_aside` every later checkpoint of its stage; return their number."""
        later = [path for found, path in self._found() if found.stage is position.stage and found > position]
        for path in later:
            self.set_aside(path, reason)
        return len(later)

    def prune(self, stage: Stage, keep: int, spared: Collection[Position] = ()) -> None:
        """Remove all but the newest `keep` checkpoints of a stage, and the spared ones."""
        mine = sorted((position, path) for position, path in self._found() if position.stage is stage)
        for position, path in mine[:-keep]:
            if position in spared:
                continue
            try:
                _remove(path)
            except OSError as error:
                logger.warning("an old checkpoint stays: %s", system_error(error, path))

    def _directory(self, position: Position) -> Path:
        return self.root / position.directory

    def _found(self) -> list[tuple[Position, Path]]:
        if not self.root.is_dir():
            if self.root.is_symlink():
                raise CheckpointError(
                    f"{self.root} is a link to {self.root.readlink()}, which is not there: mount or restore it"
                )
            return []
        return [(position, path) for path in self.root.iterdir() if (position := _position(path.name))]


def _position(name: str) -> Position | None:
    """The position that a checkpoint's name tells; None if it is not the name of one."""
    match = _NAME.fullmatch(name)
    return None if match is None else Position(Stage(match[1]), int(match[2]))


def _remove(directory: Path) -> None:
    """Remove a checkpoint, if there is one; of a link, only the link."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in a directory survive a power failure, where its file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_FOR_DIRECTORIES:
            raise
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
