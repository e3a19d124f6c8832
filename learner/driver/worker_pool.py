"""Hands calls to rollout workers and takes back what they return, whichever worker finishes first.

Ray restarts a dead worker and repeats its call (`max_restarts`, `max_task_retries`): every call carries all it needs,
so repeating it is safe. What reaches this file is a worker that could not be brought back: its calls go to the others.
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

from common.errors import WorkerError
from learner.driver.calls import death

CALLS_AHEAD = 2
"""Calls a worker holds at a time: one running and one waiting, so that it never idles between them."""
WATCH_S = 2.0
"""While nothing finishes, the servers this process started are looked after this often."""


@dataclass(frozen=True)
class Call:
    """One remote call: `key` tells the caller which one it is, `submit` starts it on a worker.

    The first of the references that `submit` returns is small and fetched when ready; the others stay where they are.
    """

    key: Hashable
    submit: Callable[[ActorHandle], list[ray.ObjectRef]]


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Finished(Generic[Key]):
    """What a call returned: its first result, fetched, and references to all of them."""

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
        """`timeout_s`: the run fails when nothing at all finishes for so long.

        `watch` is called now and then while waiting; what it raises ends the wait.
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
        """The next to finish of the submitted calls with these keys; others that finish meanwhile are kept for later.

        Raises:
            WorkerError: no worker is left, or nothing finished within the timeout.
            LearnerError: the learner died, whose weights a call was waiting for.
            RtdmdError: what a call raised in its worker.
        """
        while True:
            for key in self._finished:
                if key in keys:
                    return self._finished.pop(key)
            self._wait()

    def _wait(self) -> None:
        """Until one call has finished, or one worker turned out to be gone."""
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
            # The worker lives. Comes first: Ray makes it an instance of its cause's class as well.
            if isinstance(error.cause, RayActorError):
                raise death(error.cause) from error
            raise
        except RayActorError as error:
            self._remove(running, error)
            return
        self._finished[running.call.key] = Finished(running.call.key, result, running.references)
        self._dispatch()

    def _remove(self, running: _Running, error: RayActorError) -> None:
        """Give up on a worker that did not come back, and hand its call to the others."""
        self._workers = [worker for worker in self._workers if worker != running.worker]
        if not self._workers:
            reason = str(error).strip().splitlines()[0]
            raise WorkerError(f"the last rollout worker died and could not be restarted: {reason}") from error
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
