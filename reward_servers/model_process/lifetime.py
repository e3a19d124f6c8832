"""The lifetime of a model process: it outlasts stop signals, and it never outlasts its server."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The server drains after these. They may reach its model process as well, which the drain still needs."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that the kernel sends to this process when the thread that started it ends."""
PARENT_POLL_SECONDS = 0.5


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """A process that is started inside has its stop signals blocked from its first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlast_stop_signals() -> None:
    """Handle the signals that were blocked at the start of this process by doing nothing.

    They are neither left blocked nor ignored, because processes that a scorer starts would inherit both.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _stay)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with(parent_pid: int) -> None:
    """End this process when the server ends, however that happens, and even in the middle of a call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
    else:
        threading.Thread(target=_follow, args=(parent_pid,), daemon=True).start()


def _follow(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def _stay(number: int, frame: object) -> None:
    """Do nothing."""
