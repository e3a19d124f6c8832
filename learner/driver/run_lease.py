"""Lease of a run directory: a file names the process that uses it, and changes every few seconds while it does.

The next process takes over the file of a process that has died, which it can see on its own machine alone. Of a process
elsewhere it reads the file for `LEASE_S`: if the file changes, the directory is in use, else it is free. No clocks are
compared. Containers of one host name need not see each other's processes, so the namespace of process ids must be the
same as well.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from common.console_stream import LOG
from common.errors import ConfigError

OWNER = ".lock.owner"
ATTEMPTS = 3
RENEW_S, LEASE_S, LOOK_S = 3.0, 15.0, 0.5
"""Seconds between two changes of the file, without a change until it is free, and between two looks at it."""


@dataclass(frozen=True)
class Owner:
    """A process: where its id is valid, its id, and its start as the kernel counts it, since ids are used again."""

    host: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(socket.gethostname(), _namespace(), os.getpid(), _started(os.getpid()) or "")

    @property
    def is_here(self) -> bool:
        """Whether this process can see it: of one on another host or in another container nothing is known."""
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        return self.is_here and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def leased(run_dir: Path) -> Iterator[None]:
    """Hold the lease of a directory.

    Raises:
        ConfigError: another process holds it.
        OSError: the directory cannot be written.
    """
    lease = _Lease(run_dir)
    lease.claim()
    stop = threading.Event()
    thread = threading.Thread(target=lease.keep, args=(stop,), name="run-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lease.give_back()


def in_use(run_dir: Path, holder: str) -> str:
    return f"{run_dir} is in use by {holder}: wait for its end, or use another --run-dir"


class _Lease:
    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / OWNER
        self._owner, self._renewed = Owner.this_process(), 0

    def claim(self) -> None:
        """Create the file; take over one that is free, but never one that a third process has just created."""
        for _ in range(ATTEMPTS):
            try:
                with self._path.open("x", encoding="utf-8") as file:
                    file.write(self._text())
                return
            except FileExistsError:
                self._take_over()
        raise ConfigError(in_use(self._run_dir, "another process"))

    def keep(self, stop: threading.Event) -> None:
        """Change the file until the event; end the process if another one has taken it over."""
        while not stop.wait(RENEW_S):
            try:
                kept = self._renew()
            except OSError:
                continue  # a disk that is full or away for a while
            if not kept:
                LOG.error(f"{self._run_dir}: another process has taken it over: this run ends")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def give_back(self) -> None:
        with suppress(OSError):  # the next process waits until the lease is over
            if _parsed(_text(self._path)) == self._owner:
                self._path.unlink()

    def _renew(self) -> bool:
        """Whether the file is still this process's."""
        try:
            with self._path.open("r+", encoding="utf-8") as file:
                if _parsed(file.read()) != self._owner:
                    return False
                self._renewed += 1
                file.seek(0)
                file.write(self._text())
        except FileNotFoundError:  # somebody has removed it
            with suppress(FileExistsError), self._path.open("x", encoding="utf-8") as file:
                file.write(self._text())
        return True

    def _text(self) -> str:
        """Always of one length, so that a full disk has room for it."""
        return json.dumps({**asdict(self._owner), "renewed": f"{self._renewed:012d}"})

    def _take_over(self) -> None:
        """Remove the file if its process has ended; ConfigError if it has not, or if nothing is known of it."""
        text = _text(self._path)
        owner = _parsed(text)
        if owner is None or not (owner.is_gone or self._is_free(owner, text)):
            remedy = f". If that process has ended, remove {self._path}"
            raise ConfigError(in_use(self._run_dir, str(owner or "another process")) + remedy)
        removed = self._path.with_name(f"{OWNER}.{os.getpid()}")
        try:
            self._path.rename(removed)
        except FileNotFoundError:
            return
        if _text(removed) != text:
            # Another process took over in between: the file is its own, unless a third has created one since.
            with suppress(FileExistsError):
                os.link(removed, self._path)
        removed.unlink()

    def _is_free(self, owner: Owner, text: str) -> bool:
        """Whether the file of a process elsewhere stays as it is for `LEASE_S`."""
        if owner.is_here or "renewed" not in json.loads(text):  # the second: an earlier version changes nothing
            return False
        print(f"{self._run_dir} was used by {owner}: waiting {LEASE_S:g} s to see whether it still is", file=sys.stderr)
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            if _text(self._path) != text:
                return False
        return True


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _parsed(text: str) -> Owner | None:
    try:
        fields = json.loads(text)
        fields.pop("renewed", None)
        return Owner(**fields)
    except (ValueError, TypeError, AttributeError):
        return None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """The start of a process, in ticks since the machine's; None if there is no such process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]
