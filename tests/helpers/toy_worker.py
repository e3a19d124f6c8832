"""A rollout worker without a model: it does what a call tells it, and answers pings as the real one does."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.actor import ActorHandle

from common.heartbeat import Heartbeat
from common.progress import Progress
from common.types import ProcessPlace
from learner.driver.call_queue import CALLS_PER_WORKER, Call
from learner.driver.worker_pool import HEALTH

LOCK_IN_SMALL = "a" * 26 + "b"
"""A search in this text takes seconds, and holds the interpreter lock all the time."""
EVIL = re.compile("(a+)+$")


class ToyWorker:
    """`folder` is where calls wait for files."""

    def __init__(self, folder: Path, fingerprint: str = "base") -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._progress = Progress(ray.get_runtime_context().get_node_id(), first_call_limit_s=0.0)

    def ready(self) -> tuple[str, ProcessPlace]:
        return self._fingerprint, self._progress.place

    def heartbeat(self) -> Heartbeat:
        return self._progress.heartbeat()

    def work(self, what: str, limit_s: float) -> tuple[int, None]:
        """Return the process's number, when it is done: `nothing`, `lock SECONDS`, or `wait FILE`.

        `freeze FILE` and `die FILE` happen to the first worker alone that gets them: it leaves the file.
        """
        kind, _, value = what.partition(" ")
        with self._progress.call() as call:
            call.begin(kind, limit_s)
            if kind == "lock":
                until = time.monotonic() + float(value)
                while time.monotonic() < until:
                    EVIL.match(LOCK_IN_SMALL)
            elif kind == "wait":
                (self._folder / f"{value}.{os.getpid()}").touch()
                while not (self._folder / value).exists():
                    time.sleep(0.01)
            elif kind in ("freeze", "die"):
                mark = self._folder / value
                if not mark.exists():
                    mark.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGSTOP if kind == "freeze" else signal.SIGKILL)
        return os.getpid(), None


def work(key: int, what: str = "nothing", limit_s: float = 60.0) -> Call:
    """A call of a `ToyWorker`."""

    def submit(worker: ray.actor.ActorHandle) -> list[ray.ObjectRef]:
        references: list[ray.ObjectRef] = worker.work.options(num_returns=2).remote(what, limit_s)
        return references

    return Call(key, submit)


def toy_workers(folder: Path, fingerprint: Callable[[], str] = lambda: "base") -> Callable[[int], ActorHandle]:
    """Starts a worker that takes one CPU."""
    actor = ray.remote(
        num_cpus=1,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=CALLS_PER_WORKER,
        concurrency_groups={HEALTH: 1},
    )(ToyWorker)
    return lambda _: actor.remote(folder, fingerprint())
