"""Sends a request to one server after another until it is answered or another attempt is pointless.

    healthy replicas ─► least loaded ─► answered
         ▲               │ fails: retry, at most `attempts` times and within the retry budget
         │               │ 429, its queue is full: retry after its Retry-After, until the request's deadline
         └───────────────┘ a failed probe, or a refused connection: retry at a healthy replica, at no cost

A request has a deadline, so nothing waits forever.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from common.errors import RewardError, RewardInvalid, RewardOverloaded, RewardRejected, RewardUnavailable
from common.rewards.http import IDENTITY_TIMEOUT_S, Exchange
from common.rewards.replicas import Replica, ReplicaSet, Turn
from common.rewards.retry_budget import BACKOFF_LIMIT_S, RetryBudget, Timing

RETRY_AFTER_LIMIT_S = 30.0
"""A longer Retry-After from a server is cut to this."""
CHECKS_AT_ONCE = 8

Answer = TypeVar("Answer")
Attempt = Callable[[Replica, Exchange], Answer]
Verify = Callable[[Replica, Exchange], None]


class Attempts:
    """The attempts of one client, shared by all its requests; thread-safe.

    Args:
        timeout_s: seconds that one attempt may take; a request may take `attempts * timeout_s` in total.
        verify: checks a server's identity; RewardError when the server does not answer or has another identity.
    """

    def __init__(self, timeout_s: float, attempts: int, timing: Timing, verify: Verify) -> None:
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._timing = timing
        self._verify = verify
        self._budget = RetryBudget()
        self._checks = ThreadPoolExecutor(CHECKS_AT_ONCE, thread_name_prefix="reward-check")

    def close(self) -> None:
        self._checks.shutdown(wait=False, cancel_futures=True)

    def ask(
        self, name: str, replicas: ReplicaSet, images: int, attempt: Attempt[Answer], *, again: bool = False
    ) -> Answer:
        """Return the result of `attempt`; RewardError on giving up. `again`: this request was given up once before."""
        timing = self._timing
        deadline = timing.clock() + self._attempts * self._timeout_s
        # A server that gave an invalid response would give it again.
        avoid: set[str] = set()
        failure: RewardError | None = None
        tries = waits = 0
        if not again:
            self._budget.earn()
        while True:
            self._look_after(name, replicas)
            turn = replicas.choose(avoid)
            # A sleep may have overrun.
            limit_s = min(self._timeout_s, deadline - timing.clock())
            if turn is None or limit_s <= 0:
                raise failure or _nobody(name, replicas)
            try:
                return self.attempt_at(turn.replica, Exchange(name, turn.replica.url, limit_s), images, attempt)
            except RewardRejected:
                raise
            except RewardError as error:
                failure = error
            if isinstance(failure, RewardInvalid):
                avoid.add(turn.replica.url)
            if _cost_nothing(turn, failure) and replicas.can_be_asked(avoid):
                continue
            if isinstance(failure, RewardOverloaded):
                waits += 1
                pause_s = self._wait_for_room_s(failure, waits)
            else:
                tries += 1
                pause_s = timing.backoff_s(tries)
                if tries >= self._attempts or not replicas.can_be_asked(avoid) or not self._budget.spend():
                    raise failure
            if timing.clock() + pause_s >= deadline:
                raise failure
            timing.sleep(pause_s)

    def attempt_at(self, replica: Replica, exchange: Exchange, images: int, attempt: Attempt[Answer]) -> Answer:
        """One attempt at one server; its breaker records the outcome."""
        with replica.use(images) as request:
            return attempt(replica, Exchange(exchange.name, exchange.url, exchange.timeout_s, request))

    def _wait_for_room_s(self, failure: RewardOverloaded, number: int) -> float:
        """Wait at least the server's Retry-After; once the retry budget is spent, also wait the longest backoff."""
        soonest_s = min(failure.retry_after, RETRY_AFTER_LIMIT_S)
        return soonest_s + (self._timing.backoff_s(number) if self._budget.spend() else BACKOFF_LIMIT_S)

    def _look_after(self, name: str, replicas: ReplicaSet) -> None:
        """Start health checks of unhealthy servers. Wait for them only when no other server is available."""
        checks = [self._checks.submit(self._check, name, replica) for replica in replicas.begin_checks()]
        if checks and not replicas.can_be_asked():
            wait(checks)

    def _check(self, name: str, replica: Replica) -> None:
        healthy = False
        try:
            self._verify(replica, Exchange(name, replica.url, IDENTITY_TIMEOUT_S))
            healthy = True
        except RewardError:
            # The server was unhealthy before and still is.
            pass
        finally:
            replica.breaker.checked(healthy)


def _cost_nothing(turn: Turn, failure: RewardError) -> bool:
    """A failed probe is expected, and a refused connection put no load on the server."""
    return failure.cause == "refused" or (turn.is_probe and not isinstance(failure, RewardOverloaded))


def _nobody(name: str, replicas: ReplicaSet) -> RewardUnavailable:
    urls = replicas.urls
    if not urls:
        message = f"reward {name}: no usable server is registered under that name: start one with --redis-url"
        return RewardUnavailable(name, "no_server", message)
    message = f"reward {name}: every server failed a moment ago ({', '.join(urls)}) and is not used for now"
    return RewardUnavailable(name, "circuit_open", message)
