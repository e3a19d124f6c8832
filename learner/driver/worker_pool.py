"""Distributes calls to rollout workers and collects results in the order in which they finish.

Ray restarts a dead worker and repeats its call (`max_restarts`, `max_task_retries`). Every call carries all it needs,
so repeating it is safe. If Ray could not restart a worker, this file gives its calls to the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from common.errors import WorkerError, one_line
from learner.driver.calls import death

CALLS_AHEAD = 2
"""A worker holds this many calls at a time, one running and one waiting, so that it never idles between them."""
WATCH_S = 2.0
"""While no call finishes, the servers that this process started are checked at this interval."""


@dataclass(frozen=True)
class Call:
    """One remote call: `key` identifies it for the caller, `submit` starts it on a worker.

    The first reference that `submit` returns is small and fetched when ready; the others are not fetched.
    """

    key: Hashable
    submit: Callable[[ActorHandle], list[ray.ObjectRef]]


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Finished(Generic[Key]):
    """The result of a call: its first return value, fetched, and references to all return values."""

    key: Key
    result: Any
    references: list[ray.ObjectRef]


@dataclass
class _Running:
    call: Call
    worker: ActorHandle
    references: list[ray.ObjectRef]


class WorkerPool:
    """A queue of calls over a changing set of workers."""

    def __init__(self, workers: list[ActorHandle], timeout_s: float, watch: Callable[[], None] = lambda: None) -> None:
        """`timeout_s`: the run fails when no call finishes for this long.

        `watch` is called at intervals while waiting; an error that it raises ends the wait.
        """
        self._workers = list(workers)
        self._timeout_s = timeout_s
        self._watch = watch
        self._waiting: deque[Call] = deque()
        self._running: dict[ray.ObjectRef, _Running] = {}
        self._finished: dict[Any, Finished[Any]] = {}

    def __len__(self) -> int:
        return len(self._workers)

    def submit(self, call: Call) -> None:
        self._waiting.append(call)
        self._dispatch()

    def take(self, keys: Container[Key]) -> Finished[Key]:
        """The next submitted call with one of these keys to finish; others that finish meanwhile are kept for later.

        Raises:
            WorkerError: no worker is left, or no call finished within the timeout.
            LearnerError: the learner died while a call was waiting for its weights.
            RtdmdError: the call raised it in its worker.
        """
        while True:
            for key in self._finished:
                if key in keys:
                    return self._finished.pop(key)
            self._wait()

    def _wait(self) -> None:
        """Wait until one call has finished, or one worker has turned out to be dead."""
        deadline = time.monotonic() + self._timeout_s
        ready: list[ray.ObjectRef] = []
        while not ready and (left_s := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=min(WATCH_S, left_s))
            if not ready:
                self._watch()
        if not ready:
            raise WorkerError(f"no worker finished anything in {self._timeout_s:.0f} s: see the workers' logs")
        running = self._running.pop(ready[0])
        try:
            result = ray.get(ready[0])
        except RayTaskError as error:
            # The worker is alive. Must come first: Ray makes it an instance of its cause's class as well.
            if isinstance(error.cause, RayActorError):
                raise death(error.cause) from error
            raise
        except RayActorError as error:
            self._remove(running, error)
            return
        self._finished[running.call.key] = Finished(running.call.key, result, running.references)
        self._dispatch()

    def _remove(self, running: _Running, error: RayActorError) -> None:
        """Remove a worker that could not be restarted, and give its call to the others."""
        self._workers = [worker for worker in self._workers if worker != running.worker]
        if not self._workers:
            raise WorkerError(f"the last rollout worker died and could not be restarted: {one_line(error)}") from error
        self._waiting.appendleft(running.call)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting:
            load = {id(worker): 0 for worker in self._workers}
            for running in self._running.values():
                load[id(running.worker)] = load.get(id(running.worker), 0) + 1
            worker = min(self._workers, key=lambda candidate: load[id(candidate)])
            if load[id(worker)] >= CALLS_AHEAD:
                return
            call = self._waiting.popleft()
            references = call.submit(worker)
            self._running[references[0]] = _Running(call, worker, references)
