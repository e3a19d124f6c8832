"""Writes files whole or not at all: they get their names when they are complete and on the disk.

Their permissions are those of any new file, as the umask has them: safetensors writes files that only their owner may
read. An error names the file that could not be written, also where a library's error does not.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""safetensors reports errors of the operating system with these words, in an exception of its own."""
PARTIAL = ".partial-"


@contextmanager
def whole_files(directory: Path) -> Iterator[Path]:
    """Yield an empty folder; the files written into it are in `directory` after the block, or none if it failed.

    Raises:
        OSError: a file cannot be written; the error names it, or `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=directory) as name:
            folder, mode = Path(name), _mode_of_new_files(Path(name))
            yield folder
            for file in sorted(folder.iterdir()):
                _set_mode(file, mode)
                _sync(file)
                file.replace(directory / file.name)
    except SafetensorError as error:
        number = SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise _at(directory, OSError(int(number[1]), os.strerror(int(number[1])))) from error
    except OSError as error:
        raise _at(directory, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write one file; its directory is made if needed.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    try:
        with whole_files(path.parent) as folder:
            (folder / path.name).write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _at(directory: Path, error: OSError) -> OSError:
    """The error with the final name of a file in place of its name in the folder; with `directory` if it names none."""
    path = directory if error.filename is None else Path(os.fsdecode(error.filename))
    if path.name.startswith(PARTIAL):
        path = directory
    elif path.parent.name.startswith(PARTIAL):
        path = directory / path.name
    return OSError(error.errno, error.strerror or str(error), str(path))


def _mode_of_new_files(folder: Path) -> int:
    """The mode that the umask gives to a new file; reading the umask would change it for a moment."""
    probe = folder / "mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _set_mode(file: Path, mode: int) -> None:
    """Give a file this mode, where the file system has modes: CIFS and vfat have only those of their mount."""
    if file.stat().st_mode != mode:
        with suppress(PermissionError, NotImplementedError):
            file.chmod(mode)


def _sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())
