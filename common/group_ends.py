"""Faults that the learner finds in a scored group, and the outcome of each group that the ledger records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.types import Prompt, StepPlan


class GroupFault(StrEnum):
    """Why a group that arrived at the learner must not be trained on.

    DAMAGED: it is not what its worker sealed. REPEATED: another group of the iteration, which has arrived before.
    FOREIGN: a whole group that was not asked for. STALE: of a policy older than the one that is due. LOST: it could not
    be fetched, because its machine is gone or its bytes cannot be read.
    """

    DAMAGED = "damaged"
    REPEATED = "repeated"
    FOREIGN = "foreign"
    STALE = "stale"
    LOST = "lost"


class GroupOutcome(StrEnum):
    """The end of a group. Every group of a run has one of these."""

    TRAINED = "trained"
    STALE = "stale"
    REWARD_FAILED = "reward_failed"
    INFRA_DROPPED = "infra_dropped"


@dataclass(frozen=True)
class DueGroup:
    """A group as the driver knows it: what it asked for, and the digest that its worker reported."""

    prompt: Prompt
    plan: StepPlan
    group_size: int
    digest: str


@dataclass(frozen=True)
class RefusedGroup:
    """A group that the learner refused; its worker sampled it, but need not have damaged it."""

    worker: str
    fault: GroupFault


@dataclass(frozen=True)
class GroupEnd:
    """The end of a group, which its iteration and the index of its prompt identify.

    Attributes:
        worker: the worker of the last attempt.
        cause: of the failure, as in `Collected.dropped`; "" if the group was trained.
    """

    iteration: int
    prompt: int
    outcome: GroupOutcome
    worker: str
    attempts: int
    cause: str = ""
