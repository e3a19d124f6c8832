"""Puts a question to one server after another until it is answered, or another try is not worth it.

    who is well? ─► the least loaded ─► answered
         ▲               │ fails: again, at most `attempts` times, if the retry budget affords it
         │               │ refuses, its queue is full: again when it says, until the question's deadline
         └───────────────┘ was only on trial, or nobody listens: at another that is well, at no cost

A question has a deadline, so that nothing waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from common.errors import RewardError, RewardInvalid, RewardOverloaded, RewardRejected, RewardUnavailable
from common.rewards.http import PROBE_TIMEOUT_S, Exchange
from common.rewards.replicas import Replica, ReplicaSet, Turn
from common.rewards.retry_budget import BACKOFF_LIMIT_S, RetryBudget, Timing

RETRY_AFTER_LIMIT_S = 30.0
"""A server's Retry-After is believed up to here."""
CHECKS_AT_ONCE = 8

Answer = TypeVar("Answer")
Attempt = Callable[[Replica, Exchange], Answer]
Verify = Callable[[Replica, Exchange], None]


class Attempts:
    """The tries of one client, of all its questions together; thread-safe.

    Args:
        timeout_s: seconds one attempt may take; a question may take `attempts * timeout_s` in all.
        verify: asks a server who it is; RewardError when it does not say, or is another than it should be.
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
        """What `attempt` returns; RewardError when it is given up. `again`: a question that was given up before."""
        timing = self._timing
        deadline = timing.clock() + self._attempts * self._timeout_s
        # What a server answered wrongly it would answer wrongly again.
        avoid: set[str] = set()
        failure: RewardError | None = None
        tries = waits = 0
        if not again:
            self._budget.earn()
        while True:
            self._look_after(name, replicas)
            turn = replicas.choose(avoid)
            # A sleep may have lasted longer than asked.
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
        """One try at one server, whose breaker learns how it went."""
        with replica.use(images) as request:
            return attempt(replica, Exchange(exchange.name, exchange.url, exchange.timeout_s, request))

    def _wait_for_room_s(self, failure: RewardOverloaded, number: int) -> float:
        """Never sooner than the server says; beyond the budget of repetitions at the slowest pace."""
        soonest_s = min(failure.retry_after, RETRY_AFTER_LIMIT_S)
        return soonest_s + (self._timing.backoff_s(number) if self._budget.spend() else BACKOFF_LIMIT_S)

    def _look_after(self, name: str, replicas: ReplicaSet) -> None:
        """Have servers that were ill checked. Only when there is no other is that waited for."""
        checks = [self._checks.submit(self._check, name, replica) for replica in replicas.begin_checks()]
        if checks and not replicas.can_be_asked():
            wait(checks)

    def _check(self, name: str, replica: Replica) -> None:
        well = False
        try:
            self._verify(replica, Exchange(name, replica.url, PROBE_TIMEOUT_S))
            well = True
        except RewardError:
            # Known to be ill: nothing new.
            pass
        finally:
            replica.breaker.checked(well)


def _cost_nothing(turn: Turn, failure: RewardError) -> bool:
    """A trial is there to fail, and a refused connection was no request."""
    return failure.cause == "refused" or (turn.trial and not isinstance(failure, RewardOverloaded))


def _nobody(name: str, replicas: ReplicaSet) -> RewardUnavailable:
    urls = replicas.urls
    if not urls:
        message = f"reward {name}: no server of that name is registered that may be asked: start one with --redis-url"
        return RewardUnavailable(name, "no_server", message)
    message = f"reward {name}: every server failed a moment ago ({', '.join(urls)}) and is not asked for now"
    return RewardUnavailable(name, "circuit_open", message)
