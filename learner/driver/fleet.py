"""The rollout workers of a run: places, and who holds them. A place whose worker died gets a new one.

    place ──start──► loading ──base is the run's──► ready ──died, or ended as unhealthy──► start again

A place may start a few workers within `WINDOW_S`; then it rests until the first of these starts is that long ago. A run
goes on with whoever is ready, and ends when no place has a worker and none may start one. `resize` adds and closes
places: the worker of a closed place gets no further calls, and leaves when it has finished those it has.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ray.actor import ActorHandle

from common.errors import WorkerError
from common.types import ProcessPlace
from learner.driver.health import Pulse

WINDOW_S = 600.0


@dataclass(eq=False)
class Worker:
    """A worker, from its start to its end.

    Attributes:
        place: its number, from 1.
        process: where it runs; None while it loads.
        replaces: whether it takes the place of one that is gone.
    """

    place: int
    handle: ActorHandle
    pulse: Pulse
    process: ProcessPlace | None = None
    replaces: bool = False

    def __str__(self) -> str:
        return f"worker {self.place}" if self.process is None else f"worker {self.place} ({self.process})"


@dataclass
class _Place:
    number: int
    starts: deque[float] = field(default_factory=deque)
    worker: Worker | None = None
    has_had_one: bool = False
    closed: bool = False


class Fleet:
    """Starts workers, and knows which are ready. Used by one thread."""

    def __init__(
        self,
        start: Callable[[int], ActorHandle],
        places: int,
        restarts: int,
        unhealthy_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` gets a place's number. `restarts`: how many times a place may start another worker in `WINDOW_S`."""
        self._start = start
        self._restarts = restarts
        self._unhealthy_after_s = unhealthy_after_s
        self._clock = clock
        self._places = [_Place(number) for number in range(1, places + 1)]
        self._last_loss = ""

    def resize(self, places: int) -> None:
        """Have so many open places: the first ones. The others close, and are gone when they are empty."""
        for number in range(len(self._places) + 1, places + 1):
            self._places.append(_Place(number))
        for place in self._places:
            place.closed = place.number > places
        self._places = [place for place in self._places if not place.closed or place.worker is not None]

    @property
    def leaving(self) -> list[Worker]:
        """The workers of closed places."""
        return [place.worker for place in self._places if place.worker is not None and place.closed]

    def start_due(self) -> list[Worker]:
        """Start a worker in every empty place that may; return them."""
        now, started = self._clock(), []
        for place in self._places:
            while place.starts and now - place.starts[0] >= WINDOW_S:
                place.starts.popleft()
            if place.worker is None and not place.closed and len(place.starts) <= self._restarts:
                place.starts.append(now)
                pulse = Pulse(self._unhealthy_after_s, now)
                place.worker = Worker(place.number, self._start(place.number), pulse, replaces=place.has_had_one)
                place.has_had_one = True
                started.append(place.worker)
        return started

    @property
    def workers(self) -> list[Worker]:
        """All that hold a place, loading ones too."""
        return [place.worker for place in self._places if place.worker is not None]

    @property
    def ready(self) -> list[Worker]:
        """Those that may get calls."""
        places = [place for place in self._places if not place.closed]
        return [place.worker for place in places if place.worker is not None and place.worker.process is not None]

    def states(self, now: float) -> dict[str, int]:
        """The number of places in each state: ready, unhealthy (its process should be looked at), loading, missing."""
        states = Counter(_state(worker, now) for worker in self.workers)
        return {**states, "missing": len(self._places) - len(self.workers)}

    def remove(self, worker: Worker, reason: str) -> bool:
        """Empty a worker's place; whether it held one."""
        for place in self._places:
            if place.worker is worker:
                place.worker, self._last_loss = None, f"{worker}: {reason}"
                self._places = [other for other in self._places if other is not place or not place.closed]
                return True
        return False

    def outlook(self, number: int) -> str:
        """The future of an empty place, as the end of a sentence."""
        place = next((place for place in self._places if place.number == number), None)
        if place is None:
            return "its place was closed"
        starts = place.starts
        if len(starts) <= self._restarts:
            return "another worker is started"
        return (
            f"its place rests for {WINDOW_S - (self._clock() - starts[0]):.0f} s (workers.restarts = {self._restarts})"
        )

    def require_hope(self) -> None:
        """Raises WorkerError: no worker is left, and none may be started yet."""
        if not self.workers:
            raise WorkerError(
                f"the last rollout worker is gone, and each place has started {self._restarts + 1} of them within "
                f"{WINDOW_S / 60:.0f} minutes (workers.restarts = {self._restarts}): look at why the last one ended, "
                f"and continue with --resume; {self._last_loss}"
            )


def _state(worker: Worker, now: float) -> str:
    if worker.process is None:
        return "loading"
    return "unhealthy" if worker.pulse.is_doubtful(now) else "ready"
