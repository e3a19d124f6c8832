"""Lock of a run directory: one process uses it at a time.

The lock is the operating system's (flock), which ends with the process in whatever way that ends. Some file systems do
not have it, such as Lustre mounted without `-o flock`. There the owner is written into a file that only one process can
create. The next process on the same host takes over the file of a process that has died. Containers of one host name
need not see each other's processes, so the namespace of process ids must be the same as well.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import ConfigError

LOCK = ".lock"
OWNER = ".lock.owner"
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of a file system without flock."""
ATTEMPTS = 3


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
    def is_gone(self) -> bool:
        """Whether it is known to have ended: of a process on another host or in another container nothing is known."""
        here = (self.host, self.namespace) == (socket.gethostname(), _namespace())
        return here and _started(self.pid) != self.started


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock an existing directory.

    Raises:
        ConfigError: another process uses it.
        OSError: the directory cannot be written.
    """
    with (run_dir / LOCK).open("w") as lock:
        unsupported = _flock(run_dir, lock.fileno())
        with nullcontext() if unsupported is None else _owned(run_dir, unsupported):
            yield


def _flock(run_dir: Path, descriptor: int) -> OSError | None:
    """Lock the file; return the error of a file system that has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(_in_use(run_dir, "another process")) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return error
    return None


@contextmanager
def _owned(run_dir: Path, reason: OSError) -> Iterator[None]:
    path, own = run_dir / OWNER, json.dumps(asdict(Owner.this_process()))
    _claim(run_dir, path, own)
    print(
        f"warning: {run_dir}: its file system has no locks ({reason.strerror}): {path} marks the run's process instead",
        file=sys.stderr,
    )
    try:
        yield
    finally:
        if _text(path) == own:
            path.unlink()


def _claim(run_dir: Path, path: Path, own: str) -> None:
    """Create the file; take over that of a dead process, but never one that a third process has just created."""
    for _ in range(ATTEMPTS):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(own)
            return
        except FileExistsError as error:
            text = _text(path)
            owner = _parsed(text)
            if owner is None or not owner.is_gone:
                holder = f"process {owner.pid} on {owner.host}" if owner else "another process"
                remedy = f". If that process has ended, remove {path}"
                raise ConfigError(_in_use(run_dir, holder) + remedy) from error
            removed = path.with_name(f"{OWNER}.{os.getpid()}")
            path.rename(removed)
            taken = _text(removed)
            if taken != text:
                # Another process took over in between: the file is its own, unless a third has created one since.
                with suppress(FileExistsError):
                    os.link(removed, path)
                removed.unlink()
                continue
            removed.unlink()
    raise ConfigError(_in_use(run_dir, "another process"))


def _in_use(run_dir: Path, holder: str) -> str:
    return f"{run_dir} is in use by {holder}: wait for its end, or use another --run-dir"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _parsed(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
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
