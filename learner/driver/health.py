"""Judges from answers to pings, and from processor time, whether a process must be ended.

    silent    it has not answered for `unhealthy_after_s`, and its processor time stands still: frozen
    stuck     it answers, but its step of work is older than the step's limit, and its processor time stands still
    endless   its step is older than ENDLESS times the limit, whatever its processor does

A busy process that cannot answer, such as one that holds the interpreter lock, uses its processor and is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.types import Heartbeat

ENDLESS = 10.0
STILL_FRACTION = 0.5
"""Processor time must stand still for this part of `unhealthy_after_s`, so that a moment without a turn is no sign."""
STILL_S = 0.02
"""So few processor seconds count as none: an idle process has threads that wake up."""


@dataclass
class Pulse:
    """The signs of life of one process, with the driver's clock.

    Attributes:
        unhealthy_after_s: seconds of silence that are a sign.
        proven: whether it has finished a call. Before, only the limit of its step counts: loading may block it.
    """

    unhealthy_after_s: float
    last_answer: float
    proven: bool = False
    heartbeat: Heartbeat | None = None
    step_since: float = 0.0
    cpu_s: float | None = None
    still_since: float | None = None
    seen_at: float | None = None

    def answered(self, heartbeat: Heartbeat, now: float) -> None:
        if self.heartbeat is None or heartbeat.steps != self.heartbeat.steps:
            self.step_since = now
        self.heartbeat, self.last_answer = heartbeat, now

    def rested(self, now: float) -> None:
        """It has no work: silence until now was no sign."""
        self.last_answer, self.heartbeat = now, None
        self._forget_cpu()

    def used_cpu(self, seconds: float, now: float) -> None:
        """Its processor seconds so far, as they were at `now`."""
        self.seen_at = now
        if self.cpu_s is None or seconds > self.cpu_s + STILL_S:
            self.cpu_s, self.still_since = seconds, now

    def is_doubtful(self, now: float) -> bool:
        """Whether its processor time should be looked at."""
        doubtful = now - self.last_answer > self.unhealthy_after_s * (1 - STILL_FRACTION) or self._is_late(now)
        if not doubtful:  # what was seen in an earlier moment of doubt is no sign in a later one
            self._forget_cpu()
        return doubtful

    def fault(self, now: float) -> str:
        """Why the process must be ended; "" while it need not be."""
        silent_s = now - self.last_answer
        still = self._still_s() >= self.unhealthy_after_s * STILL_FRACTION
        if self.proven and silent_s >= self.unhealthy_after_s and still:
            return f"it has not answered for {silent_s:.0f} s, and uses no processor{self._in_step()}"
        if self._is_late(now) and (still or now - self.step_since > ENDLESS * self._limit_s()):
            return f"it gets no further{self._in_step()} for {now - self.step_since:.0f} s"
        return ""

    def _still_s(self) -> float:
        """Between the first and the last look that found the same: the driver itself may have had no turn since."""
        return self.seen_at - self.still_since if self.seen_at is not None and self.still_since is not None else 0.0

    def _forget_cpu(self) -> None:
        self.cpu_s = self.still_since = self.seen_at = None

    def _is_late(self, now: float) -> bool:
        at_work = self.heartbeat is not None and self.heartbeat.step != ""
        return at_work and now - self.step_since > self._limit_s()

    def _limit_s(self) -> float:
        assert self.heartbeat is not None
        return self.heartbeat.limit_s

    def _in_step(self) -> str:
        return f" in its step {self.heartbeat.step}" if self.heartbeat is not None and self.heartbeat.step else ""
