"""Standard output and error that never end a command: what is shown is not what is done.

    with lasting_output():
        print("a name with ü")        # an encoding without ü shows a question mark
        print("more")                 # a closed pipe (`| head`) or a lost terminal is noted once in the log

Everything that writes through `sys.stdout` is covered. Once a stream is lost, its descriptor leads to /dev/null, so
libraries and child processes that write to the descriptor go on as well.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

LOG = logging.getLogger("rtdmd")
"""The log of a command. A run writes it to a file (see `learner.records.run_log`)."""
LOG.addHandler(logging.NullHandler())


class LastingStream(io.TextIOBase):
    """A text stream whose `write` and `flush` always succeed.

    Args:
        stream: the stream to write to; None if the process was started without it.
        name: its name in the log.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._stream = stream
        self._name = name
        self.loss = "" if stream is not None else self._loss_text("it was closed when the command started")
        """Why nothing is shown any more, in one line; empty while the stream is there."""
        if stream is not None:
            # A parent such as node may leave it non-blocking: a reader that is slow for a moment would end it.
            with suppress(OSError, ValueError):  # ValueError: the stream has no descriptor
                os.set_blocking(stream.fileno(), True)
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8" if self._stream is None else self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return "replace" if self._stream is None else self._stream.errors

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream was closed in this process
                self._lose(self._stream, error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(self._stream, error)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("the process has no such stream")
        return self._stream.fileno()

    def _lose(self, stream: TextIO, error: Exception) -> None:
        self._stream = None
        with suppress(OSError, ValueError):  # ValueError: the stream has no descriptor
            lost = stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, lost)
            os.close(nowhere)
        self.loss = self._loss_text(str(error))
        LOG.warning(self.loss)

    def _loss_text(self, reason: str) -> str:
        return f"{self._name} is lost ({reason}): the command goes on and shows no more"


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make standard output and error lasting, until the block ends. What is left in their buffers is flushed then."""
    if isinstance(sys.stdout, LastingStream):
        yield
        return
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    lasting = LastingStream(sys.stdout, "standard output"), LastingStream(sys.stderr, "standard error")
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


def log_lost_streams() -> None:
    """Log again which streams are lost. A log that has just been opened does not know it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LastingStream) and stream.loss:
            LOG.warning(stream.loss)


def _fill_closed_descriptors() -> None:
    """Open /dev/null in place of closed ones: else the next file that is opened would get what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
