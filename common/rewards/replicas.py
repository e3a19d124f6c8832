"""Replicas of one reward: their health, their usual latency, and the choice of the next one."""

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

CERTAIN_CAUSES = ("refused", "hung")
"""One such failure opens the breaker: no process listens, or the server does not even answer an identity request."""
SLOW_FACTOR = 5.0
"""A request slower than this many times its server's usual latency counts as a failure for the breaker."""
SLOW_FLOOR_S = 0.5
"""Stalls shorter than this are ignored."""
RECENT = 15
"""The usual latency is the median of this many requests: few, so that a server that stays slower is soon accepted."""
FEWEST = 5
"""With fewer requests than this, no latency counts as unusual."""


class Request:
    """One request in flight: when it becomes overdue, and what its breaker has recorded of it.

    Attributes:
        patience_s: seconds to wait before checking that the server is alive.
    """

    def __init__(self, breaker: CircuitBreaker, usual_s: float | None) -> None:
        self.patience_s = max(SLOW_FLOOR_S, SLOW_FACTOR * (usual_s or 0.0))
        self._breaker = breaker
        self._usual_is_known = usual_s is not None
        self._judged = False

    def overdue(self) -> None:
        """The request is unusually slow. Count the failure now, so that other requests avoid the server sooner."""
        if self._usual_is_known and not self._judged:
            self._judged = True
            self._breaker.failed()

    def ended(self, error: BaseException | None) -> None:
        """Record the outcome. A success that was overdue does not count as one."""
        certain = isinstance(error, RewardError) and error.cause in CERTAIN_CAUSES
        if self._judged and not certain:
            return
        # A server that rejects a request is healthy: it answered correctly.
        if error is None or isinstance(error, RewardRejected | RewardOverloaded):
            self._breaker.succeeded()
        else:
            self._breaker.failed(certain=certain)


class Replica:
    """One server of a reward, thread-safe.

    Attributes:
        info: the identity that it declared, once checked.
        in_flight: number of requests in flight.
    """

    def __init__(self, url: str, timing: Timing) -> None:
        self.url = url
        self.breaker = CircuitBreaker(timing.clock, timing.draw)
        self.info: ServerInfo | None = None
        self.in_flight = 0
        self._clock = timing.clock
        self._lock = threading.Lock()
        # In seconds per image.
        self._recent: deque[float] = deque(maxlen=RECENT)

    @contextmanager
    def use(self, images: int) -> Iterator[Request]:
        """Context of one request: counts it as in flight, times it, reports to the breaker, adds the URL to its error.

        `images` is 0 for a request that needs no model; its latency is not recorded.
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
    """The chosen replica, and whether this request is its probe."""

    replica: Replica
    is_probe: bool


class ReplicaSet:
    """Replicas of one reward, thread-safe. Given ones stay; `discovered` adds and removes the others."""

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
        """Keep the given replicas and these. A replica that stays keeps its history."""
        with self._lock:
            wanted = dict.fromkeys((*self._given, *urls))
            self._replicas = {url: self._replicas.get(url) or Replica(url, self._timing) for url in wanted}

    def states(self) -> dict[str, BreakerState]:
        with self._lock:
            return {url: replica.breaker.state for url, replica in self._replicas.items()}

    def seconds_to_probe(self) -> float:
        """Seconds until a replica accepts a request or a check; 0 when one does now, or when there are none."""
        with self._lock:
            return min((replica.breaker.seconds_to_probe for replica in self._replicas.values()), default=0.0)

    def can_be_asked(self, avoid: Collection[str] = ()) -> bool:
        """Whether a replica outside `avoid` accepts requests now."""
        with self._lock:
            replicas = [replica for replica in self._replicas.values() if replica.url not in avoid]
            return any(
                replica.breaker.state is not BreakerState.OPEN and replica.breaker.seconds_to_probe == 0
                for replica in replicas
            )

    def begin_checks(self) -> list[Replica]:
        """The replicas that the caller must check now; see `CircuitBreaker.begin_check`."""
        with self._lock:
            return [replica for replica in self._replicas.values() if replica.breaker.begin_check()]

    def choose(self, avoid: Collection[str]) -> Turn | None:
        """Choose a replica: one whose probe is due, else the least loaded, with ties broken at random.

        The caller must `use` it.
        """
        with self._lock:
            candidates = [replica for replica in self._replicas.values() if replica.url not in avoid]
            closed = [replica for replica in candidates if replica.breaker.state is BreakerState.CLOSED]
            for replica in candidates:
                if replica not in closed and replica.breaker.begin():
                    return Turn(replica, is_probe=True)
            least = min(closed, key=lambda replica: (replica.in_flight, self._timing.draw()), default=None)
            return None if least is None else Turn(least, is_probe=False)

    def of_url(self, url: str) -> Replica | None:
        with self._lock:
            return self._replicas.get(url)


def same_reward(reference: ServerInfo, found: ServerInfo) -> str | None:
    """A message for the first difference between two servers' identities; None when they are equal."""
    for field, expected in vars(reference).items():
        value = vars(found)[field]
        if expected != value:
            return f"{field} is {value!r}, in this run it is {expected!r}"
    return None
