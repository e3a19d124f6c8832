"""Servers of one reward that were only heard of: each answers random pictures before it gets a request of the run.

    registered ─► identity, then random pictures ─► equal to the known servers' answers? ─► a replica
                  (in parallel, bounded)                └──► left out for a while, said once

The known servers' answers are the reference. If no server is known, the first newcomer in the order of the URLs whose
answer is valid sets it. This finds servers that are broken, or that lie always. It does not find one that asks a real
server while it is tested; only a signed registration shows who is behind an address (`common.rewards.registry`).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass

from common.errors import RewardError, RewardInvalid, RewardUnavailable, one_line
from common.rewards.answers import check_answer
from common.rewards.api import SCORE_PATH, FloatArray, ScoreResponse, ServerInfo
from common.rewards.breaker import BreakerState
from common.rewards.control_request import BLOCKS, ControlRequest, Reference
from common.rewards.http import Exchange, RewardHttp
from common.rewards.identity import RewardIdentities
from common.rewards.replicas import ReplicaSet

REFUSED_FOR_S = 30.0
"""A rejected registered server is checked again after this long."""
LOOK_S = 5.0
"""A look at the registry waits at most this long for newcomers while a server is known; their checks go on after it."""
NEWCOMERS_AT_ONCE = 32
"""At most this many checks of newcomers run at once in a client."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Introduction:
    """A server's declaration, and its scores of the random pictures, float32 [2]."""

    info: ServerInfo
    scores_B: FloatArray


@dataclass(frozen=True)
class _Refusal:
    error: RewardError
    until: float


class Newcomers:
    """Checks of one reward's newcomers. `welcome` is called by one thread at a time.

    Args:
        threads: run the checks; NEWCOMERS_AT_ONCE of them.
        reference: the known servers' answers, if a process of this run has them already.
    """

    def __init__(
        self,
        name: str,
        http: RewardHttp,
        identities: RewardIdentities,
        control: ControlRequest,
        reference: Reference | None,
        threads: Executor,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._http = http
        self._identities = identities
        self._seed = secrets.randbits(64) if reference is None else reference.seed
        self._control = control
        self._reference = reference
        self._threads = threads
        self._timeout_s = timeout_s
        self._clock = clock
        self._checks: dict[str, Future[Introduction]] = {}
        self._checks_of_known: dict[str, Future[Introduction]] = {}
        self._refused: dict[str, _Refusal] = {}
        self._reasons: dict[str, str] = {}

    def welcome(self, replicas: ReplicaSet, urls: Sequence[str]) -> None:
        """Update the registered servers. A server with other weights or answers, or without one, waits outside.

        An empty list comes from a registry that has just restarted: the last known servers stay.
        """
        found = list(dict.fromkeys(url.rstrip("/") for url in urls))
        self._forget_all_but(found)
        if not found or not self._identities.has_standard(self._name, replicas):
            return
        known = replicas.urls
        newcomers = [url for url in found if url not in known and url not in self._refused]
        self._start(self._checks, newcomers)
        if newcomers and self._reference is None:
            self._start(self._checks_of_known, [url for url in known if _is_healthy(replicas, url)])
        asked = [*(self._checks[url] for url in newcomers), *self._checks_of_known.values()]
        self._wait(asked, anyone=bool(known))
        self._learn_from_known()
        joined = self._joined(newcomers, anyone=bool(known))
        replicas.discovered([url for url in found if url in known or url in joined])

    def reference(self, replicas: ReplicaSet) -> Reference | None:
        """The known servers' answers to random pictures; None, logged, if none gives a valid one."""
        for url in replicas.urls if self._reference is None else ():
            try:
                self._set_reference(self._introduction(url).scores_B)
                break
            except RewardError as error:
                self._note(url, f"registered servers cannot be compared with this one: {error}")
        return self._reference

    def require_one_answer(self) -> None:
        """RewardInvalid if a registered server was left out because it differs from the others."""
        for refusal in self._refused.values():
            if refusal.error.cause == "weights_changed":
                raise refusal.error

    def _forget_all_but(self, found: Sequence[str]) -> None:
        now = self._clock()
        self._refused = {url: refusal for url, refusal in self._refused.items() if url in found and refusal.until > now}
        self._reasons = {url: reason for url, reason in self._reasons.items() if url in found}
        self._checks = {url: check for url, check in self._checks.items() if url in found or not check.done()}

    def _start(self, checks: dict[str, Future[Introduction]], urls: Sequence[str]) -> None:
        for url in urls:
            if url not in checks:
                checks[url] = self._threads.submit(self._introduction, url)

    def _wait(self, asked: Sequence[Future[Introduction]], *, anyone: bool) -> None:
        """Wait for all checks a little, and for a first answer longer if there is no server yet."""
        _, pending = wait(asked, LOOK_S)
        deadline = time.monotonic() + self._timeout_s
        while pending and not anyone and not any(_answered(check) for check in asked):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            _, pending = wait(pending, left_s, FIRST_COMPLETED)

    def _learn_from_known(self) -> None:
        """Take the reference from the first known server that has answered."""
        for url, check in list(self._checks_of_known.items()):
            if check.done():
                del self._checks_of_known[url]
                if self._reference is None and _answered(check):
                    self._set_reference(check.result().scores_B)

    def _joined(self, newcomers: Sequence[str], *, anyone: bool) -> list[str]:
        """The newcomers that may get requests from now on; `anyone`: there are known servers."""
        joined = []
        for url in sorted(newcomers):
            check = self._checks[url]
            if not check.done() or check.cancelled():
                continue
            if self._reference is None and anyone and _answered(check):
                # It stays introduced until a known server answers.
                self._note(url, f"{self._exchange(url).where}: no known server answers to compare it with")
                continue
            del self._checks[url]
            try:
                self._require_same(url, check.result())
                joined.append(url)
            except RewardError as error:
                self._refuse(url, error)
            except Exception as error:
                # Whatever is registered, the servers after it are looked at.
                message = f"{self._exchange(url).where}: it cannot be asked: {one_line(error)}"
                self._refuse(url, RewardUnavailable(self._name, "answer", message))
        return joined

    def _refuse(self, url: str, error: RewardError) -> None:
        self._refused[url] = _Refusal(error, self._clock() + REFUSED_FOR_S)
        self._note(url, str(error))

    def _require_same(self, url: str, introduction: Introduction) -> None:
        """RewardInvalid for another identity or other answers. Without a reference this server sets both."""
        exchange = self._exchange(url)
        self._identities.require_same(exchange, introduction.info)
        if self._reference is None:
            self._set_reference(introduction.scores_B)
            return
        difference = self._reference.difference(introduction.scores_B, introduction.info)
        if difference is not None:
            message = f"{exchange.where}: {difference}: a reward's servers must give the same scores"
            raise RewardInvalid(self._name, "weights_changed", message)

    def _set_reference(self, scores_B: FloatArray) -> None:
        self._reference = Reference(self._seed, tuple(scores_B.tolist()))

    def _introduction(self, url: str) -> Introduction:
        """The server's identity and scores; RewardError unless both are valid."""
        exchange = self._exchange(url)
        info = self._identities.declared(exchange)
        question = self._control.random_pictures(self._seed).to_bytes()
        answer = self._http.post(exchange, SCORE_PATH, question, ScoreResponse.from_bytes)
        check_answer(exchange, info, answer, len(BLOCKS))
        return Introduction(info, answer.scores_B)

    def _exchange(self, url: str) -> Exchange:
        return Exchange(self._name, url, self._timeout_s)

    def _note(self, url: str, reason: str) -> None:
        """Log a reason once, and again when it changes."""
        if self._reasons.get(url) != reason:
            logger.warning("a registered server is left out: %s", reason)
        self._reasons[url] = reason


def _is_healthy(replicas: ReplicaSet, url: str) -> bool:
    return replicas.states().get(url) is BreakerState.CLOSED


def _answered(check: Future[Introduction]) -> bool:
    """Whether a check has ended with a valid answer."""
    return check.done() and not check.cancelled() and check.exception() is None
