"""The one thread of a worker that uses its model, and the seconds for which the model was idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class ModelThread:
    """Runs the work of all calls in turn. One thread for all, because torch keeps settings of a compiler by thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._clock = clock
        self._idle_since: float | None = None

    def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which waits for its turn; an error that it raises is raised here."""
        return self.run_timed(work)[0]

    def run_timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """The same, and the seconds for which the model was idle just before; 0 at its first use."""
        return self._thread.submit(self._timed, work).result()

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        idle_s = 0.0 if self._idle_since is None else self._clock() - self._idle_since
        try:
            return work(), idle_s
        finally:
            self._idle_since = self._clock()
