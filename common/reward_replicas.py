"""The servers of one reward: which there are, which are well, and which is asked next."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from common.circuit_breaker import BreakerState, CircuitBreaker
from common.errors import RewardOverloaded, RewardRejected
from common.retry_budget import Timing
from common.reward_api import ServerInfo


class Replica:
    """One server of a reward. `info` is what it declared of itself, once it has been asked and found right."""

    def __init__(self, url: str, timing: Timing) -> None:
        self.url = url
        self.breaker = CircuitBreaker(timing.clock, timing.draw)
        self.info: ServerInfo | None = None
        self.in_flight = 0


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

    def discovered(self, urls: Iterable[str]) -> None:
        """Keep the given replicas and these; one that stays keeps its history."""
        with self._lock:
            wanted = dict.fromkeys((*self._given, *urls))
            self._replicas = {url: self._replicas.get(url) or Replica(url, self._timing) for url in wanted}

    def states(self) -> dict[str, BreakerState]:
        with self._lock:
            return {url: replica.breaker.state for url, replica in self._replicas.items()}

    def seconds_to_probe(self) -> float:
        """How long until one of them may be asked; 0 when one may now, or there is none."""
        with self._lock:
            return min((replica.breaker.seconds_to_probe for replica in self._replicas.values()), default=0.0)

    def is_open(self, avoid: Collection[str]) -> bool:
        """Whether one not to be avoided may be asked now."""
        with self._lock:
            return any(r.breaker.seconds_to_probe == 0 for r in self._replicas.values() if r.url not in avoid)

    def choose(self, avoid: Collection[str]) -> Replica | None:
        """One to ask now: a probe that is due, else the one with the fewest requests under way, any among equals.

        The caller must `use` it.
        """
        with self._lock:
            candidates = [replica for replica in self._replicas.values() if replica.url not in avoid]
            closed = [replica for replica in candidates if replica.breaker.state is BreakerState.CLOSED]
            for replica in candidates:
                if replica not in closed and replica.breaker.begin():
                    return replica
            return min(closed, key=lambda replica: (replica.in_flight, self._timing.draw()), default=None)

    @contextmanager
    def use(self, replica: Replica) -> Iterator[None]:
        """Around one request: counts it as under way and tells the breaker how it went."""
        with self._lock:
            replica.in_flight += 1
        try:
            yield
        except (RewardRejected, RewardOverloaded):
            # It answers, and rightly so: nothing is wrong with the server.
            replica.breaker.succeeded()
            raise
        except BaseException:
            replica.breaker.failed()
            raise
        else:
            replica.breaker.succeeded()
        finally:
            with self._lock:
                replica.in_flight -= 1


def same_reward(reference: ServerInfo, found: ServerInfo) -> str | None:
    """What differs, in words, between what two servers of one reward declare; None when they are the same."""
    for field in ("scorer", "weights_hash", "preprocess_version", "version", "low", "high", "differentiable"):
        expected, value = vars(reference)[field], vars(found)[field]
        if expected != value:
            return f"{field} is {value!r}, in this run it is {expected!r}"
    return None
