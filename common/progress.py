"""The present steps of a process's calls. Another of its threads reads them, for the driver's health checks.

A step of work has a limit. The driver ends a process that has a step older than that, and does nothing else either.
"""

from __future__ import annotations

import os
import socket
import time
from threading import Lock

from common.heartbeat import Heartbeat, StepAtWork
from common.types import ProcessPlace

STEP_LIMIT_S = 60.0
FIRST_CALL_LIMIT_S = 1800.0
"""The first call may compile the model, and load what is loaded at first use."""
WAIT_FOR_RANKS = "wait_for_ranks"
"""The step in which a rank of the learner waits for the others. It has no limit: what the others do has."""


def no_step(_name: str) -> None:
    """Takes the name of a step that begins, where nobody follows the steps."""


class Progress:
    """The present step of each of the process's calls. Calls may run on several threads."""

    def __init__(self, node: str, first_call_limit_s: float = FIRST_CALL_LIMIT_S) -> None:
        """`node`: Ray's id of this machine."""
        self._first_call_limit_s = first_call_limit_s
        self._place = ProcessPlace(node, socket.gethostname(), os.getpid())
        self._lock = Lock()
        self._begun = 0
        self._first_call = True
        self._at_work: dict[Call, StepAtWork] = {}

    @property
    def place(self) -> ProcessPlace:
        return self._place

    def heartbeat(self) -> Heartbeat:
        with self._lock:
            return Heartbeat(self._place, tuple(self._at_work.values()))

    def call(self) -> Call:
        """A context that covers one call."""
        return Call(self)

    def begin(self, call: Call, step: str, limit_s: float) -> None:
        with self._lock:
            self._begun += 1
            limit_s = max(limit_s, self._first_call_limit_s) if self._first_call else limit_s
            self._at_work[call] = StepAtWork(self._begun, step, limit_s)

    def end(self, call: Call) -> None:
        with self._lock:
            self._at_work.pop(call, None)

    def finished(self) -> None:
        """A call has returned a result: from now on every step has its own limit."""
        with self._lock:
            self._first_call = False


class Call:
    """The steps of one call, and the seconds that each took, by name. Between two steps it waits for its turn."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._step, self._since = "", 0.0

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()
        if kind is None:
            self._progress.finished()

    def begin(self, step: str, limit_s: float = STEP_LIMIT_S) -> None:
        """End the step before, and begin this one."""
        self.end()
        self._progress.begin(self, step, limit_s)
        self._step, self._since = step, time.perf_counter()

    def end(self) -> None:
        """End the present step, so that its seconds are known."""
        if self._step:
            self.seconds[self._step] = time.perf_counter() - self._since
            self._step = ""
        self._progress.end(self)
