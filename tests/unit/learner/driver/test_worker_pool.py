"""What ends the wait for a result. Faults of real workers: `tests/integration/test_worker_pool.py`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from ray.exceptions import RayActorError

from common.errors import AttestationError, ConfigError, ModelError, RewardUnavailable, WorkerError
from common.heartbeat import Heartbeat, StepAtWork
from common.types import ProcessPlace, RewardHealth
from learner.driver import worker_pool
from learner.driver.call_queue import Call
from learner.driver.calls import CALL_TIMEOUT_S
from learner.driver.fleet import Fleet
from learner.driver.worker_pool import WorkerPool
from learner.records.prometheus import RunMetrics
from tests.helpers.hand_clock import HandClock
from tests.helpers.remote_errors import raised_remotely
from tests.helpers.waiting import wait_until

DEAD = RayActorError(error_msg="The actor died.\nThe process was killed: out of memory.")
PLACE = ProcessPlace("node", "host", 0)


class Reference:
    """A reference whose answer is known, or a future."""

    def __init__(self, answer: Any) -> None:
        self._answer: Future[Any] = answer if isinstance(answer, Future) else Future()
        if isinstance(answer, Exception):
            self._answer.set_exception(answer)
        elif not isinstance(answer, Future):
            self._answer.set_result(answer)

    def future(self) -> Future[Any]:
        return self._answer


class Method:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def options(self, **_: object) -> Method:
        return self

    def remote(self) -> Reference:
        return Reference(self._answer)


class Handle:
    """A worker that answers as it is told."""

    def __init__(self, ready: Any, heartbeat: Any = DEAD) -> None:
        self.ready, self.heartbeat = Method(ready), Method(heartbeat)


class NoMachines:
    def cpu_seconds(self, *_: object) -> None:
        """Never known."""

    def end(self, *_: object) -> None:
        """There is no process."""

    def kill(self, *_: object) -> None:
        """There is no actor."""


@contextmanager
def pool(ready: Any = ("base", PLACE), heartbeat: Any = DEAD, restarts: int = 0, **more: Any) -> Iterator[WorkerPool]:
    fleet = Fleet(lambda _: Handle(ready, heartbeat), 2, restarts, 5.0)  # type: ignore[arg-type,return-value]
    with WorkerPool(fleet, NoMachines(), 5.0, **more) as started:
        yield started


def value(metrics: RunMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"rtdmd_{name}", {"run": "test", **labels})


def test_workers_end_with_the_pool_also_those_that_still_load() -> None:
    killed: list[object] = []

    class Machines(NoMachines):
        def kill(self, *actors: object) -> None:
            killed.extend(actors)

    handles = [Handle(("base", PLACE)), Handle(Future())]
    fleet = Fleet(lambda place: handles[place - 1], 2, 0, 5.0)  # type: ignore[arg-type]
    with WorkerPool(fleet, Machines(), 5.0) as workers:
        workers.admit("base", 1)
    assert killed == handles


def test_a_surplus_worker_leaves_when_its_call_is_done() -> None:
    answers: dict[object, Future[Any]] = {}

    def submit(handle: object) -> list[Any]:
        answers[handle] = Future()
        return [Reference(answers[handle]), None]

    handles = [Handle(("base", PLACE), Heartbeat(PLACE, ())) for _ in range(2)]
    fleet, said = Fleet(lambda place: handles[place - 1], 2, 0, 5.0), list[str]()  # type: ignore[arg-type]
    with WorkerPool(fleet, NoMachines(), 5.0, say=said.append) as workers:
        workers.admit("base", 2)
        for key in ("a", "b"):
            workers.submit(Call(key, submit))  # type: ignore[arg-type]
        wait_until(lambda: len(answers) == 2, "both workers to have a call")
        workers.resize(1)
        wait_until(lambda: bool(fleet.leaving), "the second place to close")
        assert said == []
        for answer in answers.values():
            answer.set_result("result")
        assert {workers.take(["a", "b"]).result for _ in range(2)} == {"result"}
        wait_until(lambda: bool(said), "the surplus worker to leave")
        assert said == ["worker 2 (host:0) has left: the run uses fewer workers now"]
        assert len(workers) == 1
        workers.check()


def call(answer: Any) -> Call:
    return Call("key", lambda _: [Reference(answer), None])  # type: ignore[list-item]


def test_a_result_is_returned_with_its_references() -> None:
    with pool() as workers:
        workers.admit("base", 2)
        workers.submit(call("result"))
        finished = workers.take(["key"])
        assert (finished.key, finished.result, finished.references[1]) == ("key", "result", None)
        assert len(workers) == 2


def test_an_error_in_a_worker_is_raised_where_the_driver_waits() -> None:
    with pool() as workers:
        workers.admit("base", 1)
        workers.submit(call(raised_remotely(AttestationError("other weights"))))
        with pytest.raises(AttestationError, match="other weights"):
            workers.take(["key"])


def test_a_model_that_cannot_be_loaded_ends_the_start() -> None:
    failed = RayActorError(error_msg="The actor failed.\nModelError: model is no directory", actor_init_failed=True)
    with pool(ready=failed) as workers, pytest.raises(ModelError, match="could not start: ModelError: model is no dir"):
        workers.admit("base", 1)


def test_servers_are_watched_while_nothing_finishes() -> None:
    def watch() -> None:
        raise RewardUnavailable("bright", "died", "the local server bright ended")

    with pool(watch=watch) as workers, pytest.raises(RewardUnavailable, match="bright ended"):
        workers.take(["key"])


def test_calls_that_never_finish_end_the_wait() -> None:
    """No worker reports a step, so none can be blamed."""
    clock, begun = HandClock(), Event()

    def submit(_: Any) -> list[Any]:
        begun.set()
        return [Reference(Future()), None]

    with pool(clock=clock) as workers:
        workers.admit("base", 2)
        workers.submit(Call("key", submit))
        assert begun.wait(60)
        clock.now = CALL_TIMEOUT_S + 1
        with pytest.raises(WorkerError, match="no worker finished anything in 1800 s"):
            workers.take(["key"])


def test_too_few_workers_end_the_start_with_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "CALL_TIMEOUT_S", 0.1)
    with pool(ready=Future()) as workers, pytest.raises(ConfigError, match="0 of 2 workers were ready in"):
        workers.admit("base", 2)


def test_the_metrics_follow_the_workers() -> None:
    """What a busy worker reports is shown; a lost worker is counted when another takes its place."""
    metrics = RunMetrics(CollectorRegistry(), "test")
    heartbeat = Heartbeat(
        PLACE, (StepAtWork(1, "score", 60.0),), {"hps": RewardHealth({"closed": 0, "open": 1}, 1)}, 500
    )
    answer: Future[Any] = Future()
    with pool(heartbeat=heartbeat, restarts=1, metrics=metrics) as workers:
        workers.admit("base", 2)
        wait_until(lambda: value(metrics, "workers", state="ready") == 2, "both workers to be shown")
        workers.submit(call(answer))
        wait_until(lambda: value(metrics, "reward_held_workers", reward="hps") == 1, "the held request to be shown")
        assert value(metrics, "reward_connections", reward="hps", state="open") == 1
        assert value(metrics, "peak_memory_bytes", process="workers") == 500
        assert value(metrics, "worker_restarts_total") == 0
        answer.set_exception(DEAD)
        wait_until(lambda: (value(metrics, "worker_restarts_total") or 0) >= 1, "the restart to be counted")
