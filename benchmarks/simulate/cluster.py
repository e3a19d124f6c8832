"""Simulated machines with workers: their start, their faults, and the driver's hand on their processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

from benchmarks.simulate.network import Network, SharedObject
from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.timeline import Timeline
from benchmarks.simulate.worker import Journal, SimulatedWorker
from common.types import ProcessPlace

LEARNER_MACHINE = 0


class Cluster:
    """Machines that are numbered from 1, each with room for the same number of workers; 0 is the learner's.

    It is also the `Machines` of the driver. `losses`: how many times each machine was lost.
    """

    def __init__(self, timeline: Timeline, scenario: Scenario) -> None:
        self._timeline, self._scenario = timeline, scenario
        self.network = Network(timeline, scenario.bytes_per_s, scenario.call_s)
        self.journal = Journal()
        self.random = Random(scenario.seed)
        self.objects: list[SharedObject] = []
        self._numbers = count(1)
        self._room = dict.fromkeys(range(1, scenario.machines + 1), scenario.workers_per_machine)
        self._waiting: list[SimulatedWorker] = []
        self._workers: dict[int, SimulatedWorker] = {}
        self.losses: Counter[int] = Counter()
        slow = round(scenario.slow_workers * scenario.workers)
        self._slow = set(self.random.sample(range(1, scenario.workers + 1), slow))

    def start(self, _place: int) -> SimulatedWorker:
        """A worker, which is put on a machine as soon as one has room for it."""
        number = next(self._numbers)
        factor = self._scenario.slow_factor if number in self._slow else 1.0
        worker = SimulatedWorker(number, factor, self._timeline, self._scenario, self.random, self.journal)
        self._waiting.append(worker)
        self._place()
        return worker

    def shared(self, size: int) -> SharedObject:
        """An object that the learner's machine will hold."""
        found = SharedObject(self.network, LEARNER_MACHINE, size, self._scenario.pull_rule, self.random)
        self.objects.append(found)
        return found

    def lose_machine(self) -> None:
        """A machine is lost with all that it holds. It comes back empty."""
        used = [machine for machine, room in self._room.items() if room < self._scenario.workers_per_machine]
        machine = self.random.choice(used)
        self.losses[machine] += 1
        self._room[machine] = 0
        self.network.cut_off(machine)
        for shared in self.objects:
            shared.lose(machine)
        for worker in [one for one in self._workers.values() if one.machine == machine]:
            self.journal.faults += 1
            del self._workers[worker.number]
            worker.die("its machine is gone", self._scenario.machine_noticed_s)
        self._timeline.after(self._scenario.back_s, lambda: self._bring_back(machine))

    def _bring_back(self, machine: int) -> None:
        self._room[machine] = self._scenario.workers_per_machine
        self._place()

    def _place(self) -> None:
        while self._waiting and max(self._room.values()) > 0:
            machine = max(self._room, key=lambda one: self._room[one])
            self._room[machine] -= 1
            worker = self._waiting.pop(0)
            self._workers[worker.number] = worker
            worker.load(machine, self.losses[machine])

    # ── Machines of the driver ───────────────────────────────────────────────────────────────────────────────────────

    def cpu_seconds(self, place: ProcessPlace, then: Callable[[float], None]) -> None:
        worker = self._workers.get(place.pid)
        if worker is not None:
            self._timeline.after(2 * self._scenario.call_s, lambda: then(worker.cpu_seconds()))

    def end(self, place: ProcessPlace) -> None:
        """`kill` does it."""

    def kill(self, actor: Any) -> None:
        if actor in self._waiting:
            self._waiting.remove(actor)
        if self._workers.pop(actor.number, None) is not None:
            self._room[actor.machine] += 1
            actor.die("it was ended", self._scenario.noticed_s)
            self._place()
