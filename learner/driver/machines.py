"""Looks at processes of the run, and ends them, on the machine where each runs.

On the driver's own machine this is a system call. On another one a small actor does it, which takes no resources.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.types import ProcessPlace
from learner.driver.cluster import actor_environment


class Machines(Protocol):
    """Processor time and end of processes, and of actors."""

    def cpu_seconds(self, place: ProcessPlace, then: Callable[[float], None]) -> None:
        """Call `then`, perhaps from another thread, with the processor seconds; never, if they cannot be known."""

    def end(self, place: ProcessPlace) -> None:
        """SIGKILL; nothing if the process, or its machine, is gone."""

    def kill(self, actor: ActorHandle) -> None:
        """End an actor, also one that waits for room; nothing if it is gone. A frozen process needs `end` as well."""


class RayMachines:
    """The machines of the cluster that this driver is connected to."""

    def __init__(self) -> None:
        self._own = ray.get_runtime_context().get_node_id()
        self._others: dict[str, ActorHandle] = {}

    def cpu_seconds(self, place: ProcessPlace, then: Callable[[float], None]) -> None:
        if place.node == self._own:
            with suppress(psutil.Error):
                then(_cpu_seconds(place.pid))
            return
        asked: Future[float] = self._at(place).cpu_seconds.remote(place.pid).future()
        asked.add_done_callback(lambda answer: then(answer.result()) if answer.exception() is None else None)

    def end(self, place: ProcessPlace) -> None:
        if place.node == self._own:
            _end(place.pid)
        else:
            self._at(place).end.remote(place.pid)

    def kill(self, actor: ActorHandle) -> None:
        with suppress(RayError):
            ray.kill(actor)

    def _at(self, place: ProcessPlace) -> ActorHandle:
        if place.node not in self._others:
            options = ray.remote(num_cpus=0, max_restarts=-1, runtime_env=actor_environment())
            where = NodeAffinitySchedulingStrategy(place.node, soft=False)
            self._others[place.node] = options(_Machine).options(scheduling_strategy=where).remote()
        return self._others[place.node]


class _Machine:
    """Runs on another machine."""

    def cpu_seconds(self, pid: int) -> float:
        return _cpu_seconds(pid)

    def end(self, pid: int) -> None:
        _end(pid)


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
