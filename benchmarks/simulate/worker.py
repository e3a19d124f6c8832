"""A simulated rollout worker: the calls of `rollout_workers.actor.RolloutWorker`, in virtual time.

    call ──► waits for the weights, pulls them ──► waits for the model ──► applies, samples ──► is scored ──► answer

A fault happens at a random moment of the sampling. A frozen worker gets no further and answers no ping.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from benchmarks.simulate.network import SharedObject
from benchmarks.simulate.references import Method, Reference
from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.timeline import Timeline
from common.heartbeat import Heartbeat, StepAtWork
from common.progress import FIRST_CALL_LIMIT_S, STEP_LIMIT_S
from common.types import PolicyVersion, ProcessPlace, Prompt, RolloutOutcome, StepPlan

BASE = "base"
"""Fingerprint of everybody's base model."""


@dataclass
class Journal:
    """Events of all workers: counts, and seconds.

    Attributes:
        sampled: groups that were sampled, also in vain.
        busy_s: seconds in which a model was used.
        calls: of the driver to workers, pings too.
        lost: the groups that a fault has cut off -> its time, until another worker gets them.
    """

    sampled: int = 0
    busy_s: float = 0.0
    calls: int = 0
    faults: int = 0
    lost: dict[tuple[int, int], float] = field(default_factory=dict)
    recoveries_s: list[float] = field(default_factory=list)


class Published(Reference):
    """A version of the weights: its number comes with time, its bytes are pulled."""

    def __init__(self, number: int, shared: SharedObject) -> None:
        super().__init__()
        self.number, self.shared = number, shared


@dataclass(frozen=True)
class GroupReference:
    """A group in the store of its worker's machine, unless that was lost more often than `losses` since."""

    machine: int
    losses: int
    version: int
    iteration: int


@dataclass(eq=False)
class _Call:
    key: tuple[int, int]
    weights: Published
    outcome: Reference = field(default_factory=Reference)
    step: StepAtWork | None = None
    missing: int = 2
    """Objects that have not arrived."""


class SimulatedWorker:
    """The handle of a worker's actor, and the worker. `machine` is 0 until it is placed."""

    def __init__(
        self, number: int, factor: float, timeline: Timeline, scenario: Scenario, random: Random, journal: Journal
    ) -> None:
        """`factor`: it takes so many times the usual seconds."""
        self.number, self.machine, self.losses = number, 0, 0
        self._factor, self._timeline, self._scenario, self._random = factor, timeline, scenario, random
        self._journal = journal
        self._loaded, self._calls, self._for_model = Reference(), list[_Call](), deque[_Call]()
        self._pings: list[Reference] = []
        self._alive = True
        """False also for a frozen one."""
        self._death: str | None = None
        self._begun, self._version, self._used_since = 0, -1, 0.0
        self._uses_model, self._proven = False, False
        self._stopped_at = 0.0
        self.ready = Method(lambda: self._loaded)
        self.heartbeat = Method(self._ping)
        self.rollout = Method(self._rollout)

    @property
    def place(self) -> ProcessPlace:
        """The process number is the worker's."""
        return ProcessPlace(str(self.machine), f"machine{self.machine}", self.number)

    def load(self, machine: int, losses: int) -> None:
        """It was placed; the machine was lost so many times before."""
        self.machine, self.losses = machine, losses
        self._later(self._scenario.load_s, lambda: self._loaded.give((BASE, self.place)))

    def cpu_seconds(self) -> float:
        """It uses its processor until it stops."""
        return self._timeline.now if self._alive else self._stopped_at

    def freeze(self) -> None:
        """Get no further from now on."""
        if self._alive:
            self._alive, self._stopped_at = False, self._timeline.now
            for call in self._calls:
                self._journal.lost[call.key] = self._timeline.now

    def die(self, reason: str, noticed_s: float) -> None:
        """End; the driver hears of it after so many seconds."""
        self.freeze()
        if self._death is None:
            self._death = reason
            self._timeline.after(noticed_s, self._report)

    def _report(self) -> None:
        for reference in (self._loaded, *self._pings, *(call.outcome for call in self._calls)):
            reference.fail(self._death or "")

    def _later(self, seconds: float, then: Callable[[], None]) -> None:
        """Do something, if it is still alive then."""
        self._timeline.after(seconds, lambda: then() if self._alive else None)

    # ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ping(self) -> Reference:
        self._journal.calls += 1
        reference = Reference()
        self._pings = [one for one in self._pings if not one.future().done()]
        self._pings.append(reference)

        def answer() -> None:
            steps = tuple(call.step for call in self._calls if call.step is not None)
            reference.give(Heartbeat(self.place, steps))

        self._later(2 * self._scenario.call_s, answer)
        return reference

    def _rollout(
        self,
        prompt: Prompt,
        plan: StepPlan,
        _group_size: int,
        weights: Published,
        frozen: Published,
        *,
        pictured: bool,  # noqa: ARG002
    ) -> tuple[Reference, GroupReference]:
        self._journal.calls += 1
        call = _Call((plan.iteration, prompt.index), weights)
        if call.key in self._journal.lost:
            self._journal.recoveries_s.append(self._timeline.now - self._journal.lost.pop(call.key))
        self._calls.append(call)
        for published in (weights, frozen):
            published.shared.pull(self.machine, partial(self._later, 0.0, partial(self._arrived, call)))
        return call.outcome, GroupReference(self.machine, self.losses, weights.number, plan.iteration)

    def _arrived(self, call: _Call) -> None:
        call.missing -= 1
        if call.missing == 0:
            self._for_model.append(call)
            self._next()

    def _next(self) -> None:
        """The model takes the oldest call that waits for it."""
        if self._uses_model or not self._for_model:
            return
        self._uses_model = True
        call = self._for_model.popleft()
        seconds = self._scenario.sample_s * self._spread()
        if self._version != call.weights.number:
            self._version = call.weights.number
            seconds += self._scenario.apply_s * self._factor
        self._begin(call, "rollout")
        if self._random.random() < self._scenario.lost_calls:
            self._later(seconds * self._random.random(), self._fault)
        self._later(seconds, lambda: self._sampled(call, seconds))

    def _sampled(self, call: _Call, seconds: float) -> None:
        self._journal.sampled += 1
        self._journal.busy_s += seconds
        self._uses_model = False
        self._begin(call, "score")
        self._later(self._scenario.score_s * self._spread(), lambda: self._scored(call, seconds))
        self._next()

    def _scored(self, call: _Call, seconds: float) -> None:
        call.step, self._proven = None, True
        self._calls.remove(call)
        version = PolicyVersion(call.weights.number, "")
        outcome = RolloutOutcome(str(self.place), version, {"rollout": seconds}, digest=f"{call.key}")
        self._timeline.after(self._scenario.call_s, lambda: call.outcome.give(outcome))

    def _begin(self, call: _Call, step: str) -> None:
        self._begun += 1
        call.step = StepAtWork(self._begun, step, STEP_LIMIT_S if self._proven else FIRST_CALL_LIMIT_S)

    def _spread(self) -> float:
        return self._factor * max(0.1, self._random.gauss(1.0, self._scenario.jitter))

    def _fault(self) -> None:
        self._journal.faults += 1
        if self._journal.faults % 2:
            self.die("it was killed", self._scenario.noticed_s)
        else:
            self.freeze()
