"""Identity of a reward's servers: the same scorer and weights throughout a run, also for servers that join later.

The identity that the driver read at the start is the reference. Without one, the first server to answer sets it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common.errors import RewardError, RewardInvalid
from common.rewards.api import INFO_PATH, ServerInfo
from common.rewards.http import Exchange, RewardHttp
from common.rewards.replicas import Replica, ReplicaSet, same_reward
from common.urls import server_url_fault

INFO_TIMEOUT_S = 5.0
"""A server answers an identity request without its model, even when it is busy."""
REFUSED_FOR_S = 30.0
"""A rejected registered server is checked again after this long."""
NEWCOMERS_AT_ONCE = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Refusal:
    error: RewardError
    until: float


class RewardIdentities:
    """The declared identity of every reward of a client; thread-safe.

    Args:
        infos: the identities that the rewards declared when the run began.
        timeout_s: the client's request timeout; at most `INFO_TIMEOUT_S` of it is used.
    """

    def __init__(
        self, http: RewardHttp, infos: Mapping[str, ServerInfo], timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._http = http
        self._infos = dict(infos)
        # reward -> the server that set its reference.
        self._declared_by: dict[str, str] = {}
        self._refused: dict[tuple[str, str], _Refusal] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        self._timeout_s = min(timeout_s, INFO_TIMEOUT_S)
        self._clock = clock

    def known(self, name: str) -> ServerInfo | None:
        return self._infos.get(name)

    def verify(self, replica: Replica, exchange: Exchange) -> None:
        """Check a server's identity; RewardError when it does not answer or has another identity."""
        exchange = Exchange(exchange.name, exchange.url, min(exchange.timeout_s, self._timeout_s))
        info = self._http.get(exchange, INFO_PATH, ServerInfo.from_json)
        self._require_same(exchange, info)
        replica.info = info

    def verify_all(self, name: str, replicas: ReplicaSet) -> None:
        """Check the identity of every server of a reward. One that answers is enough: the others may join later.

        Raises:
            RewardError: no server answers, or one has a different identity. Also if all servers are registered ones and
                their identities differ, because there is no reference to choose between them.
        """
        silent: list[RewardError] = []
        for url in replicas.urls:
            try:
                replica = replicas.of_url(url)
                if replica is not None:
                    self.verify(replica, Exchange(name, url, self._timeout_s))
            except RewardInvalid:
                raise
            except RewardError as error:
                silent.append(error)
        if silent and len(silent) == len(replicas.urls):
            raise silent[0]
        for failure in silent:
            logger.warning("continuing with the other servers of the reward %s: %s", name, failure)
        if not replicas.given:
            for (reward, _), refusal in list(self._refused.items()):
                if reward == name and refusal.error.cause == "weights_changed":
                    raise refusal.error

    def welcome(self, name: str, replicas: ReplicaSet, urls: Sequence[str]) -> None:
        """Update the registered servers. A server with other weights, or without an answer, is left out for a while.

        An empty list comes from a registry that has just restarted: the last known servers stay.
        """
        found = list(dict.fromkeys(url.rstrip("/") for url in urls))
        known, now = replicas.urls, self._clock()
        for key, refusal in list(self._refused.items()):
            if key[0] == name and (key[1] not in found or refusal.until <= now):
                del self._refused[key]
        for key in [key for key in list(self._reasons) if key[0] == name and key[1] not in found]:
            del self._reasons[key]
        if not found or not self._has_standard(name, replicas):
            return
        newcomers = [url for url in found if url not in known and (name, url) not in self._refused]
        if newcomers:
            with ThreadPoolExecutor(NEWCOMERS_AT_ONCE, thread_name_prefix="reward-newcomer") as threads:
                errors = threads.map(lambda url: self._refuse(name, url), newcomers)
            for url, error in zip(newcomers, errors, strict=True):
                if error is not None:
                    self._note(name, url, str(error))
                    self._refused[name, url] = _Refusal(error, now + REFUSED_FOR_S)
        replicas.discovered([url for url in found if (name, url) not in self._refused])

    def _note(self, name: str, url: str, reason: str) -> None:
        """Log a reason once, and again when it changes."""
        if self._reasons.get((name, url)) != reason:
            logger.warning("a registered server is left out: %s", reason)
        self._reasons[name, url] = reason

    def _has_standard(self, name: str, replicas: ReplicaSet) -> bool:
        """Servers named in the run file set the reference before registered servers are compared with it."""
        for url in replicas.given if name not in self._infos else ():
            replica = replicas.of_url(url)
            if replica is not None and self._refuse(name, url) is None:
                return True
        return name in self._infos or not replicas.given

    def _refuse(self, name: str, url: str) -> RewardError | None:
        """The reason why this server cannot serve the reward, or None."""
        exchange = Exchange(name, url, self._timeout_s)
        fault = server_url_fault(url)
        if fault:
            return RewardInvalid(name, "answer", f"{exchange.where}: {fault}")
        try:
            self._require_same(exchange, self._http.get(exchange, INFO_PATH, ServerInfo.from_json))
        except RewardError as error:
            return error
        return None

    def _require_same(self, exchange: Exchange, info: ServerInfo) -> None:
        name = exchange.name
        # Two threads may check at once; the first identity stays the reference.
        standard = self._infos.setdefault(name, info)
        if standard is info:
            self._declared_by[name] = exchange.url
        difference = same_reward(standard, info)
        if difference is not None:
            by = f" (declared by {self._declared_by[name]})" if name in self._declared_by else ""
            message = f"{exchange.where}: {difference}{by}: a reward's servers must stay identical throughout a run"
            raise RewardInvalid(name, "weights_changed", message)
