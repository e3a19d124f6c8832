"""A folder for sockets: the path of a Unix socket has at most 107 bytes, less than many a TMPDIR."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common.errors import ConfigError

SOCKET_BYTES = 107
SHORT_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


def short_folder(room: int, variable: str, environ: Mapping[str, str]) -> Path:
    """A writable folder whose path leaves `room` bytes for the name of a socket.

    Args:
        variable: names the folder to take, if it is set.

    Raises:
        ConfigError: the named folder is too long or cannot be written, or there is no folder at all.
    """
    named = environ.get(variable)
    candidates = [Path(named).absolute()] if named else [Path(tempfile.gettempdir()), *SHORT_FOLDERS]
    for folder in candidates:
        if len(os.fsencode(folder)) + room <= SOCKET_BYTES and _writable(folder):
            return folder
    raise ConfigError(
        f"{variable} = {named or ''}: set {variable} to a folder that can be written and whose path has at most "
        f"{SOCKET_BYTES - room} bytes, for sockets; tried {', '.join(map(str, candidates))}"
    )


def _writable(folder: Path) -> bool:
    """Whether a file can be written there, also on a disk that may be full; a missing folder is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"x")
    except OSError:
        return False
    return True
