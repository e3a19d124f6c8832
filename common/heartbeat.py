"""Answers of a process to a ping of the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.types import ProcessPlace, RewardHealth


@dataclass(frozen=True)
class StepAtWork:
    """The part of work that one call of a process is in.

    Attributes:
        number: grows with every step that the process begins, so that each has its own.
        limit_s: seconds that it may take.
    """

    number: int
    name: str
    limit_s: float


@dataclass(frozen=True)
class Heartbeat:
    """A process's answer to a ping.

    Attributes:
        at_work: the present step of each call; calls that wait for the model have none.
        rewards: its view of each reward.
        peak_bytes: its peak memory, of its GPU if it has one.
    """

    place: ProcessPlace
    at_work: tuple[StepAtWork, ...]
    rewards: Mapping[str, RewardHealth] = field(default_factory=dict)
    peak_bytes: int = 0
