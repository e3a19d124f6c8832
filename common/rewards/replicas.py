"""The servers of one reward: which there are, which are well, how fast they are, and which is asked next."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import RewardError, RewardOverloaded, RewardRejected
from common.rewards.api import ServerInfo
from common.rewards.breaker import BreakerState, CircuitBreaker
from common.rewards.retry_budget import Timing

# Nobody listens, or nobody answers even who he is: one such failure says as much as three.
CERTAIN_CAUSES = ("refused", "hung")
SLOW_FACTOR = 5.0
"""A request that takes this many times what is usual for its server counts as failed for the breaker."""
SLOW_FLOOR_S = 0.5
"""A stall shorter than this is nobody's illness."""
RECENT = 15
"""Requests that say what is usual: few, so that a server that stays slower is soon taken as it is."""
FEWEST = 5
"""Before so many nothing is usual."""


class Request:
    """One request under way: when it is unusual, and what its breaker has been told of it.

    Attributes:
        patience_s: how long it may take before it is asked whether the server is there at all.
    """

    def __init__(self, breaker: CircuitBreaker, usual_s: float | None) -> None:
        self.patience_s = max(SLOW_FLOOR_S, SLOW_FACTOR * (usual_s or 0.0))
        self._breaker = breaker
        self._usual_is_known = usual_s is not None
        self._judged = False

    def overdue(self) -> None:
        """It takes unusually long: counted now, so that others need not wait as long to find out."""
        if self._usual_is_known and not self._judged:
            self._judged = True
            self._breaker.failed()

    def ended(self, error: BaseException | None) -> None:
        """An answer that was overdue says nothing good of its server."""
        certain = isinstance(error, RewardError) and error.cause in CERTAIN_CAUSES
        if self._judged and not certain:
            return
        # One that refuses a request answers, and rightly so: nothing is wrong with it.
        if error is None or isinstance(error, RewardRejected | RewardOverloaded):
            self._breaker.succeeded()
        else:
            self._breaker.failed(certain=certain)


class Replica:
    """One server of a reward, thread-safe.

    Attributes:
        info: what it declared of itself, once it has been asked and found right.
        in_flight: requests under way.
    """

    def __init__(self, url: str, timing: Timing) -> None:
        self.url = url
        self.breaker = CircuitBreaker(timing.clock, timing.draw)
        self.info: ServerInfo | None = None
        self.in_flight = 0
        self._clock = timing.clock
        self._lock = threading.Lock()
        # Seconds per image.
        self._recent: deque[float] = deque(maxlen=RECENT)

    @contextmanager
    def use(self, images: int) -> Iterator[Request]:
        """Around one request: counts it as under way, times it, tells the breaker how it went, signs what it raises.

        `images` is 0 for a request that needs no model, whose time says nothing of others.
        """
        with self._lock:
            self.in_flight += 1
            usual_s = images * statistics.median(self._recent) if len(self._recent) >= FEWEST else None
        request, started = Request(self.breaker, usual_s), self._clock()
        try:
            yield request
        except BaseException as error:
            request.ended(error)
            if isinstance(error, RewardError):
                error.url = self.url
            raise
        else:
            request.ended(None)
            with self._lock:
                if images > 0:
                    self._recent.append((self._clock() - started) / images)
        finally:
            with self._lock:
                self.in_flight -= 1


@dataclass(frozen=True)
class Turn:
    """Which replica is asked now, and whether that is its trial after an illness."""

    replica: Replica
    trial: bool


class ReplicaSet:
    """Replicas of one reward, thread-safe. Given ones stay; discovered ones come and go (`discovered`)."""

    def __init__(self, urls: Iterable[str], timing: Timing) -> None:
        self._timing = timing
        self._lock = threading.Lock()
        self._given = tuple(dict.fromkeys(urls))
        self._replicas = {url: Replica(url, timing) for url in self._given}

    @property
    def urls(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._replicas)

    @property
    def given(self) -> tuple[str, ...]:
        return self._given

    def discovered(self, urls: Iterable[str]) -> None:
        """Keep the given replicas and these; one that stays keeps its history."""
        with self._lock:
            wanted = dict.fromkeys((*self._given, *urls))
            self._replicas = {url: self._replicas.get(url) or Replica(url, self._timing) for url in wanted}

    def states(self) -> dict[str, BreakerState]:
        with self._lock:
            return {url: replica.breaker.state for url, replica in self._replicas.items()}

    def seconds_to_probe(self) -> float:
        """How long until one of them may be asked or checked; 0 when one may now, or there is none."""
        with self._lock:
            return min((replica.breaker.seconds_to_probe for replica in self._replicas.values()), default=0.0)

    def can_be_asked(self, avoid: Collection[str] = ()) -> bool:
        """Whether one not to be avoided takes questions now."""
        with self._lock:
            replicas = [replica for replica in self._replicas.values() if replica.url not in avoid]
            return any(
                replica.breaker.state is not BreakerState.OPEN and replica.breaker.seconds_to_probe == 0
                for replica in replicas
            )

    def begin_checks(self) -> list[Replica]:
        """Those that the caller must check now; see `CircuitBreaker.begin_check`."""
        with self._lock:
            return [replica for replica in self._replicas.values() if replica.breaker.begin_check()]

    def choose(self, avoid: Collection[str]) -> Turn | None:
        """One to ask now: a trial that is due, else the one with the fewest requests under way, any among equals.

        The caller must `use` it.
        """
        with self._lock:
            candidates = [replica for replica in self._replicas.values() if replica.url not in avoid]
            closed = [replica for replica in candidates if replica.breaker.state is BreakerState.CLOSED]
            for replica in candidates:
                if replica not in closed and replica.breaker.begin():
                    return Turn(replica, trial=True)
            least = min(closed, key=lambda replica: (replica.in_flight, self._timing.draw()), default=None)
            return None if least is None else Turn(least, trial=False)

    def of_url(self, url: str) -> Replica | None:
        with self._lock:
            return self._replicas.get(url)


def same_reward(reference: ServerInfo, found: ServerInfo) -> str | None:
    """What differs, in words, between what two servers of one reward declare; None when they are the same."""
    for field, expected in vars(reference).items():
        value = vars(found)[field]
        if expected != value:
            return f"{field} is {value!r}, in this run it is {expected!r}"
    return None
