"""Lock of a run directory: one process uses it at a time, of all machines that see it.

The lock is the operating system's (flock), which ends with the process in whatever way that ends. Some file systems do
not have it, such as Lustre mounted without `-o flock`, and on others it holds on one machine only. So the process also
has a lease, see `learner.driver.run_lease`.
"""

from __future__ import annotations

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError
from learner.driver.run_lease import OWNER, in_use, leased

LOCK = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of a file system without flock."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock an existing directory.

    Raises:
        ConfigError: another process uses it.
        OSError: the directory cannot be written.
    """
    with (run_dir / LOCK).open("w") as lock:
        unsupported = _flock(run_dir, lock.fileno())
        with leased(run_dir):
            if unsupported is not None:
                reason = f"its file system has no locks ({unsupported.strerror})"
                print(
                    f"warning: {run_dir}: {reason}: {run_dir / OWNER} marks the run's process instead", file=sys.stderr
                )
            yield


def _flock(run_dir: Path, descriptor: int) -> OSError | None:
    """Lock the file; return the error of a file system that has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(in_use(run_dir, "another process")) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return error
    return None
