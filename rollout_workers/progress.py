"""The present step of a worker's work. Another thread of its process reads it, for the driver's health checks.

A step of work has a limit. The driver ends a worker whose step is older than that, and whose process does nothing.
"""

from __future__ import annotations

import os
import socket
import time

from common.types import Heartbeat, ProcessPlace

STEP_LIMIT_S = 60.0
FIRST_CALL_LIMIT_S = 1800.0
"""The first call may compile the model, and load what is loaded at first use."""


class Progress:
    """The present step of the worker's calls, and the seconds of the finished ones."""

    def __init__(self, node: str, first_call_limit_s: float = FIRST_CALL_LIMIT_S) -> None:
        """`node`: Ray's id of this machine."""
        self._first_call_limit_s = first_call_limit_s
        self._place = ProcessPlace(node, socket.gethostname(), os.getpid())
        self._begun = 0
        self._first_call = True
        # Replaced as a whole, so that the other thread never sees half a change.
        self._now = Heartbeat(self._place, 0, "", STEP_LIMIT_S)

    @property
    def place(self) -> ProcessPlace:
        return self._place

    def heartbeat(self) -> Heartbeat:
        return self._now

    def call(self) -> Call:
        """A context that covers one call."""
        return Call(self)

    def begin(self, step: str, limit_s: float) -> None:
        self._begun += 1
        limit_s = max(limit_s, self._first_call_limit_s) if self._first_call else limit_s
        self._now = Heartbeat(self._place, self._begun, step, limit_s)

    def end_call(self, *, finished: bool) -> None:
        self._begun += 1
        self._first_call = self._first_call and not finished
        self._now = Heartbeat(self._place, self._begun, "", STEP_LIMIT_S)


class Call:
    """The steps of one call, and the seconds that each took, by name."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._step, self._since = "", 0.0

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        self._progress.end_call(finished=kind is None)

    def begin(self, step: str, limit_s: float = STEP_LIMIT_S) -> None:
        """End the step before, and begin this one."""
        self._close()
        self._progress.begin(step, limit_s)
        self._step, self._since = step, time.perf_counter()

    def end(self) -> None:
        """End the last step, so that its seconds are known."""
        self._close()

    def _close(self) -> None:
        if self._step:
            self.seconds[self._step] = time.perf_counter() - self._since
            self._step = ""
