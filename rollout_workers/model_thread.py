"""The one thread of a worker that uses its model, and the seconds for which the model was idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

Result = TypeVar("Result")


class ModelThread:
    """Runs the work of all calls in turn. One thread for all, because torch keeps settings of a compiler by thread."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, when_idle: Callable[[], None] = lambda: None
    ) -> None:
        """`when_idle` runs on the thread after work that no other work waits for."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._clock = clock
        self._when_idle = when_idle
        self._lock = Lock()
        self._due = 0
        self._idle_since: float | None = None

    @property
    def due(self) -> int:
        """Work that was given to the thread and has not ended."""
        return self._due

    def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which waits for its turn; an error that it raises is raised here."""
        return self.run_timed(work)[0]

    def run_timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """The same, and the seconds for which the model was idle just before; 0 at its first use."""
        with self._lock:
            self._due += 1
        return self._thread.submit(self._timed, work).result()

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        idle_s = 0.0 if self._idle_since is None else self._clock() - self._idle_since
        try:
            return work(), idle_s
        finally:
            with self._lock:
                self._due -= 1
                last = self._due == 0
            if last:
                self._when_idle()
            self._idle_since = self._clock()
