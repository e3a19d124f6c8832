"""Appends lines to a file of a run, and outlasts a disk that is full for a while.

Lines that cannot be written are held in memory and written before the next ones, in their order. What was written of
them in part is taken back, so the file never holds half a line followed by another one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from common.command import system_error
from common.console_stream import LOG


class LineFile:
    """A file of lines; created, if needed, by the first ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = b""
        self._warned = False

    def append(self, lines: str) -> None:
        """Write whole lines, or hold them: a disk that refuses them is a warning, once until it takes them again."""
        self._held += lines.encode()
        try:
            self.settle()
        except OSError as error:
            if not self._warned:
                self._warned = True
                LOG.warning(
                    f"{system_error(error, self.path)}: its lines are held in memory until then; the run goes on"
                )

    def settle(self) -> None:
        """Write the lines that are held.

        Raises:
            OSError: they still cannot be written; the error names the file.
        """
        if not self._held:
            return
        try:
            self._write()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._held, self._warned = b"", False

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            end, left = file.seek(0, os.SEEK_END), memoryview(self._held)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
