"""Guardian process between a reward server and its vLLM: ends vLLM when the server is gone, for whatever reason.

    python -I guardian.py FOLDER COMMAND ...

The server holds the other end of our standard input. When it closes (the server stopped, crashed or was killed), vLLM
and every process that vLLM started are ended and FOLDER is removed. When vLLM ends first, the guardian ends with its
exit status; FOLDER then stays, because the server reads the log in it. Standard library alone: it must not fail.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""vLLM gets this long to end by itself."""
KILLED = 128
"""A process ended by signal N has exit status KILLED + N, as in a shell."""


def main(folder: str, command: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A handler and not SIG_IGN, which vLLM would inherit.
        signal.signal(number, _stay)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    while child.poll() is None and not _server_gone():
        pass
    abandoned = child.returncode is None
    _signal_group(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    # Also when vLLM is gone: its engine is a separate process.
    _signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    if abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else KILLED - status


def _server_gone() -> bool:
    """Wait a moment; return whether standard input was closed in the meantime."""
    readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
    return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _stay(number: int, frame: object) -> None:
    """Ignore the signal: the guardian ends when vLLM has."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
