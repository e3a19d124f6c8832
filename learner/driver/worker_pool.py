"""Distributes calls to rollout workers, and collects results in the order in which they finish.

A thread of its own hands out calls, follows the workers' health and replaces those that are gone, whatever the driver
waits for. Every call carries all it needs, so a call whose worker is gone is given to another, and a slow worker's call
to an idle one as well: the first result counts, and both would be the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Self, TypeVar

import ray
from prometheus_client import CollectorRegistry
from ray.exceptions import RayActorError, RayTaskError

from common.errors import ConfigError, ModelError, WorkerError
from common.heartbeat import Heartbeat
from common.types import ProcessPlace
from learner.driver.call_queue import Attempt, Call, CallQueue
from learner.driver.calls import CALL_TIMEOUT_S, remote_reason
from learner.driver.event_thread import Events, EventThread
from learner.driver.fleet import Fleet, Worker
from learner.driver.machines import Machines
from learner.records.prometheus import RunMetrics

HEALTH = "health"
"""The concurrency group of a worker's `heartbeat`: a thread of its own answers it."""
CHECK_S = 0.25
"""Health is judged, and the servers that this process started are looked at, at this interval."""
PINGS = 5
"""Pings within `workers.unhealthy_after_s`."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Finished(Generic[Key]):
    """The result of a call: its first return value, fetched, and references to all return values."""

    key: Key
    result: Any
    references: list[ray.ObjectRef]


class WorkerPool:
    """A queue of calls over a changing set of workers. A context manager: inside it the thread runs."""

    def __init__(
        self,
        fleet: Fleet,
        machines: Machines,
        unhealthy_after_s: float,
        watch: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        metrics: RunMetrics | None = None,
        events: Events | None = None,
    ) -> None:
        """`watch` is called at intervals; an error that it raises ends the wait. `say` tells of losses and joins.

        `events`: a thread by default; a simulation runs the same events in virtual time.
        """
        self._metrics = metrics or RunMetrics(CollectorRegistry(), "unnamed")
        self._fleet, self._machines, self._watch, self._say, self._clock = fleet, machines, watch, say, clock
        self._ping_s = unhealthy_after_s / PINGS
        self._calls = CallQueue()
        self._last_result = clock()
        self._fingerprint: str | None = None
        self._arrived: list[tuple[Worker, str, ProcessPlace]] = []
        self._pinged: dict[Worker, float] = {}
        self._asked: set[Worker] = set()
        self._events = events or EventThread("worker-pool", clock)
        self._finished: dict[Any, Finished[Any]] = {}
        self._ready = 0

    def __enter__(self) -> Self:
        self._events.start(self._check, CHECK_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._events.stop()
        for worker in self._fleet.workers:  # one that something still refers to would keep its resources
            self._machines.kill(worker.handle)

    # ── the driver's side ────────────────────────────────────────────────────────────────────────────────────────────

    def __len__(self) -> int:
        """The number of workers that are ready."""
        return self._ready

    def check(self) -> None:
        """Raise what a wait for a result would raise at once."""
        self._events.raise_error()

    def resize(self, workers: int) -> None:
        """Use so many workers. Further ones join when they have loaded; surplus ones finish their calls first."""
        self._events.put(partial(self._fleet.resize, workers))

    def submit(self, call: Call) -> None:
        self._events.put(partial(self._add, call))

    def take(self, keys: Container[Key]) -> Finished[Key]:
        """The next submitted call with one of these keys to finish; others that finish meanwhile are kept for later.

        Raises:
            WorkerError: no worker is left and none may be started, or no call finished in `CALL_TIMEOUT_S`.
            RtdmdError: the call raised it in its worker.
        """

        def look() -> Finished[Key] | None:
            key = next((key for key in self._finished if key in keys), None)
            return None if key is None else self._finished.pop(key)

        finished = self._events.until(look)
        assert finished is not None, "without a limit the wait ends with a result or an error"
        return finished

    def admit(self, fingerprint: str, count: int) -> None:
        """Let the workers whose base has this fingerprint join, and wait until `count` of them are ready.

        Raises:
            ModelError: a worker could not load the model, or has another one.
            ConfigError: fewer were placed and have loaded in `CALL_TIMEOUT_S`.
        """
        self._events.put(partial(self._know, fingerprint))
        if self._events.until(lambda: self._ready >= count or None, CALL_TIMEOUT_S) is None:
            raise ConfigError(
                f"{self._ready} of {count} workers were ready in {CALL_TIMEOUT_S:.0f} s: does the cluster have "
                "the CPUs and GPUs that workers.* asks for?"
            )

    # ── the thread's side ────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        self._watch()
        for worker in self._fleet.start_due():
            if worker.replaces:
                self._metrics.worker_replaced()
            self._when(worker.handle.ready.remote(), partial(self._arrive, worker))
        self._dismiss()
        self._fleet.require_hope()
        for worker in self._fleet.workers:
            self._look_at(worker)
        self._metrics.workers(self._fleet.states(self._clock()))
        if self._calls.due() and self._clock() - self._last_result > CALL_TIMEOUT_S:
            raise WorkerError(
                f"no worker finished anything in {CALL_TIMEOUT_S:.0f} s: look into the logs of workers and learner, "
                "and continue with --resume"
            )
        self._dispatch()

    def _when(self, reference: ray.ObjectRef, then: Callable[[Future[Any]], None]) -> None:
        """Have the thread call `then` when the reference is ready."""
        reference.future().add_done_callback(lambda answer: self._events.put(partial(then, answer)))

    # workers

    def _arrive(self, worker: Worker, answer: Future[tuple[str, ProcessPlace]]) -> None:
        """A worker has loaded, or could not."""
        error = answer.exception()
        if error is None:
            fingerprint, process = answer.result()
            self._arrived.append((worker, fingerprint, process))
            self._join()
            return
        reason = remote_reason(error)
        if not self._fleet.ready and not (isinstance(error, RayActorError) and _was_killed(error)):
            raise ModelError(f"learner or workers could not start: {reason}") from error
        self._lose(worker, f"it could not start: {reason}")

    def _know(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._join()

    def _join(self) -> None:
        """Make workers ready that have arrived with the run's base."""
        if self._fingerprint is None:
            return
        for worker, fingerprint, process in self._arrived:
            if fingerprint != self._fingerprint and not self._fleet.ready:
                raise ModelError("learner and workers found different models at backbone.path: give all the same")
            worker.process, worker.pulse.last_answer = process, self._clock()
            if fingerprint != self._fingerprint:
                self._lose(worker, "it found another model at backbone.path than the learner")
        self._arrived.clear()
        self._tell_ready()
        self._dispatch()

    def _lose(self, worker: Worker, reason: str) -> None:
        """Remove a worker, and give its calls to the others."""
        back = self._remove(worker, reason)
        if back is None:
            return  # it was removed before
        calls = f"{back} call goes" if back == 1 else f"{back} calls go"
        self._say(f"{worker} is gone: {reason}; {calls} to others, and {self._fleet.outlook(worker.place)}")

    def _remove(self, worker: Worker, reason: str) -> int | None:
        """End a worker; return the number of its calls, which others get. None if it was removed before."""
        if not self._fleet.remove(worker, reason):
            return None
        back = self._calls.give_up(worker)
        self._pinged.pop(worker, None)
        self._machines.kill(worker.handle)
        if worker.process is not None:
            self._machines.end(worker.process)
            self._metrics.worker_rests(worker.process)
        self._tell_ready()
        return back

    def _dismiss(self) -> None:
        """End the workers of closed places that have no call."""
        for worker in self._fleet.leaving:
            if not self._calls.load(worker):
                self._remove(worker, "its place was closed")
                self._say(f"{worker} has left: the run uses fewer workers now")

    def _tell_ready(self) -> None:
        with self._events.changing():
            self._ready = len(self._fleet.ready)

    # health

    def _look_at(self, worker: Worker) -> None:
        """Ping a worker that has calls, and end it if it must be."""
        now = self._clock()
        if worker.process is None:
            if now - worker.pulse.last_answer > CALL_TIMEOUT_S:
                self._lose(worker, f"it was not ready {CALL_TIMEOUT_S:.0f} s after its start")
            return
        if not self._calls.load(worker):
            worker.pulse.rested(now)
            self._metrics.worker_rests(worker.process)
            return
        if worker not in self._asked and now - self._pinged.get(worker, 0.0) >= self._ping_s:
            self._asked.add(worker)
            self._pinged[worker] = now
            heartbeat = worker.handle.heartbeat.options(concurrency_group=HEALTH).remote()
            self._when(heartbeat, partial(self._hear, worker))
        if worker.pulse.is_doubtful(now):
            self._machines.cpu_seconds(worker.process, partial(self._see, worker))
        fault = worker.pulse.fault(now)
        if fault:
            self._lose(worker, fault)

    def _hear(self, worker: Worker, answer: Future[Heartbeat]) -> None:
        self._asked.discard(worker)
        if answer.exception() is None and worker in self._fleet.workers:
            heartbeat = answer.result()
            worker.pulse.answered(heartbeat, self._clock())
            self._metrics.worker_reported(heartbeat.place, heartbeat.rewards, heartbeat.peak_bytes)

    def _see(self, worker: Worker, seconds: float) -> None:
        now = self._clock()
        self._events.put(lambda: worker.pulse.used_cpu(seconds, now))

    # calls

    def _add(self, call: Call) -> None:
        if not self._calls.due():
            self._last_result = self._clock()
        self._calls.add(call)
        self._dispatch()

    def _dispatch(self) -> None:
        ready, now = self._fleet.ready, self._clock()
        while (attempt := self._calls.next(ready, now)) is not None:
            if self._calls.load(attempt.worker) == 1:
                attempt.worker.pulse.rested(now)
            references = attempt.call.submit(attempt.worker.handle)
            self._when(references[0], partial(self._end, attempt, references))

    def _end(self, attempt: Attempt, references: list[ray.ObjectRef], answer: Future[Any]) -> None:
        """A call has finished on a worker, or its worker is gone."""
        if not self._calls.holds(attempt):
            return  # the worker was given up before
        error = answer.exception()
        # Ray makes an error that was raised remotely an instance of its cause's class as well.
        if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
            self._lose(attempt.worker, remote_reason(error))
        elif error is not None:
            raise error
        else:
            attempt.worker.pulse.proven = True
            self._metrics.progressed()
            self._last_result = self._clock()
            if self._calls.finish(attempt, self._clock()):
                self._keep(Finished(attempt.call.key, answer.result(), references))
        self._dispatch()

    def _keep(self, finished: Finished[Any]) -> None:
        with self._events.changing():
            self._finished[finished.key] = finished


def _was_killed(error: RayActorError) -> bool:
    """Whether the process was ended from outside: then another one may load what this one did not."""
    return not error.actor_init_failed
