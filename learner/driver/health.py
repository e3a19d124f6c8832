"""Judges from answers to pings, and from processor time, whether a process must be ended.

    silent    it has not answered for `unhealthy_after_s`, and its processor time stands still: frozen
    stuck     it answers, but a step of its work is older than the step's limit, and its processor time stands still
    stalled   a step is older than STALLED times its limit, and the other call has begun a step since the limit: the
              processor works for that call
    endless   a step is older than ENDLESS times its limit, whatever the processor does

A busy process that cannot answer, such as one that holds the interpreter lock, uses its processor and is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.heartbeat import Heartbeat, StepAtWork

STALLED, ENDLESS = 2.0, 10.0
STILL_FRACTION = 0.5
"""Processor time must stand still for this part of `unhealthy_after_s`, so that a moment without a turn is no sign."""
STILL_S = 0.02
"""So few processor seconds count as none: an idle process has threads that wake up."""


@dataclass
class Pulse:
    """The signs of life of one process, with the driver's clock.

    Attributes:
        unhealthy_after_s: seconds of silence that are a sign.
        proven: whether it has finished a call. Before, only the limits of its steps count: loading may block it.
        since: when each of the present steps was first heard of, by the step's number.
    """

    unhealthy_after_s: float
    last_answer: float
    proven: bool = False
    at_work: tuple[StepAtWork, ...] = ()
    since: dict[int, float] = field(default_factory=dict)
    cpu_s: float | None = None
    still_since: float | None = None
    seen_at: float | None = None

    def answered(self, heartbeat: Heartbeat, now: float) -> None:
        self.at_work, self.last_answer = heartbeat.at_work, now
        self.since = {step.number: self.since.get(step.number, now) for step in heartbeat.at_work}

    def rested(self, now: float) -> None:
        """It has no work: silence until now was no sign."""
        self.last_answer, self.at_work, self.since = now, (), {}
        self._forget_cpu()

    def used_cpu(self, seconds: float, now: float) -> None:
        """Its processor seconds so far, as they were at `now`."""
        self.seen_at = now
        if self.cpu_s is None or seconds > self.cpu_s + STILL_S:
            self.cpu_s, self.still_since = seconds, now

    def is_doubtful(self, now: float) -> bool:
        """Whether its processor time should be looked at."""
        doubtful = now - self.last_answer > self.unhealthy_after_s * (1 - STILL_FRACTION)
        doubtful = doubtful or any(self._is_late(step, now) for step in self.at_work)
        if not doubtful:  # what was seen in an earlier moment of doubt is no sign in a later one
            self._forget_cpu()
        return doubtful

    def fault(self, now: float) -> str:
        """Why the process must be ended; "" while it need not be."""
        silent_s = now - self.last_answer
        still = self._still_s() >= self.unhealthy_after_s * STILL_FRACTION
        if self.proven and silent_s >= self.unhealthy_after_s and still:
            return f"it has not answered for {silent_s:.0f} s, and uses no processor{self._in_steps()}"
        for step in self.at_work:
            if self._is_late(step, now) and (still or self._is_stalled(step, now) or self._is_endless(step, now)):
                return f"it gets no further in its step {step.name} for {self._age_s(step, now):.0f} s"
        return ""

    def _still_s(self) -> float:
        """Between the first and the last look that found the same: the driver itself may have had no turn since."""
        return self.seen_at - self.still_since if self.seen_at is not None and self.still_since is not None else 0.0

    def _forget_cpu(self) -> None:
        self.cpu_s = self.still_since = self.seen_at = None

    def _age_s(self, step: StepAtWork, now: float) -> float:
        return now - self.since[step.number]

    def _is_late(self, step: StepAtWork, now: float) -> bool:
        return self._age_s(step, now) > step.limit_s

    def _is_stalled(self, step: StepAtWork, now: float) -> bool:
        """Whether it is much too late, and another call has begun a step since it was late."""
        others_go_on = max(self.since.values()) > self.since[step.number] + step.limit_s
        return others_go_on and self._age_s(step, now) > STALLED * step.limit_s

    def _is_endless(self, step: StepAtWork, now: float) -> bool:
        return self._age_s(step, now) > ENDLESS * step.limit_s

    def _in_steps(self) -> str:
        names = " and ".join(step.name for step in self.at_work)
        return f" in its step {names}" if names else ""
