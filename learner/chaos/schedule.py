"""Draws the faults of a run and their moments: a function of the seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Target(StrEnum):
    """A process of a run."""

    WORKER = "rollout worker"
    LEARNER = "learner"
    REWARD_SERVER = "reward server"
    REDIS = "redis"
    DRIVER = "driver"


class Fault(StrEnum):
    """Damage to a process.

    kill: SIGKILL. freeze: SIGSTOP for good. end: SIGTERM. slow: it runs a tenth of the time, for some seconds.
    full_disk: it can write to no file, for some seconds.
    """

    KILL = "kill"
    FREEZE = "freeze"
    END = "end"
    SLOW = "slow"
    FULL_DISK = "full disk"


POSSIBLE: Mapping[Target, tuple[Fault, ...]] = {
    Target.WORKER: (Fault.KILL, Fault.FREEZE, Fault.SLOW),
    Target.LEARNER: (Fault.KILL, Fault.FREEZE, Fault.SLOW, Fault.FULL_DISK),
    Target.REWARD_SERVER: (Fault.KILL, Fault.END, Fault.SLOW),
    Target.REDIS: (Fault.KILL, Fault.FREEZE, Fault.END),
    Target.DRIVER: (Fault.KILL, Fault.SLOW, Fault.FULL_DISK),
}
"""Left out: ending an actor (Ray takes SIGTERM for a kill) or the driver (a person's way to stop a run). Freezing a
reward server (requests wait for their timeout of 60 s) or the driver (nothing watches it). A full disk where nothing
is written.
"""
MOST: Mapping[Target, int] = {Target.LEARNER: 3, Target.REWARD_SERVER: 3, Target.REDIS: 1}
"""Times that a target is lost at most: a run ends by name when a learner or a server dies for the 4th time within 10
minutes, and a lost Redis does not come back.
"""
LATEST = 0.9
"""An injection comes after at most this share of the iterations, so that the run has time to heal."""


@dataclass(frozen=True)
class Injection:
    """One fault.

    Attributes:
        after: iterations of both stages that have finished before it.
        delay_s: seconds to wait then, so that it comes at any moment of an iteration.
        pick: from [0, 1): which of several processes it hits.
    """

    after: int
    delay_s: float
    target: Target
    fault: Fault
    pick: float

    def __str__(self) -> str:
        return f"{self.fault} {self.target}"


def schedule(seed: int, injections: int, iterations: int) -> list[Injection]:
    """Injections in the order of their time, spread over a run of so many iterations of both stages."""
    draw, lost = random.Random(seed), Counter[Target]()
    found = []
    for number in range(injections):
        choices = [
            (target, fault)
            for target, faults in POSSIBLE.items()
            for fault in faults
            if lost[target] < MOST.get(target, injections)
        ]
        target = draw.choice(list(dict.fromkeys(target for target, _ in choices)))
        fault = draw.choice([fault for of, fault in choices if of is target])
        lost[target] += 1
        first, last = (LATEST * iterations * place / injections for place in (number, number + 1))
        found.append(Injection(1 + int(draw.uniform(first, last)), draw.uniform(0, 2), target, fault, draw.random()))
    return sorted(found, key=lambda one: one.after)
