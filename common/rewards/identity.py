"""Identity of a reward's servers: the same scorer and weights throughout a run, also for servers that join later.

The identity that the driver read at the start is the reference. Without one, the first server to answer sets it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

from common.errors import RewardError, RewardInvalid
from common.rewards.api import INFO_PATH, ServerInfo
from common.rewards.http import Exchange, RewardHttp
from common.rewards.replicas import Replica, ReplicaSet, same_reward
from common.urls import server_url_fault

INFO_TIMEOUT_S = 5.0
"""A server answers an identity request without its model, even when it is busy."""

logger = logging.getLogger(__name__)


class RewardIdentities:
    """The declared identity of every reward of a client; thread-safe.

    Args:
        infos: the identities that the rewards declared when the run began.
        timeout_s: the client's request timeout; at most `INFO_TIMEOUT_S` of it is used.
    """

    def __init__(self, http: RewardHttp, infos: Mapping[str, ServerInfo], timeout_s: float) -> None:
        self._http = http
        self._infos = dict(infos)
        # reward -> the server that set its reference.
        self._declared_by: dict[str, str] = {}
        self._timeout_s = min(timeout_s, INFO_TIMEOUT_S)

    def known(self, name: str) -> ServerInfo | None:
        return self._infos.get(name)

    def verify(self, replica: Replica, exchange: Exchange) -> None:
        """Check a server's identity; RewardError when it does not answer or has another identity."""
        exchange = Exchange(exchange.name, exchange.url, min(exchange.timeout_s, self._timeout_s))
        info = self._http.get(exchange, INFO_PATH, ServerInfo.from_json)
        self.require_same(exchange, info)
        replica.info = info

    def verify_all(self, name: str, replicas: ReplicaSet) -> None:
        """Check the identity of every server of a reward. One that answers is enough: the others may join later.

        Raises:
            RewardError: no server answers, or one has a different identity.
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

    def has_standard(self, name: str, replicas: ReplicaSet) -> bool:
        """Servers named in the run file set the reference before registered servers are compared with it."""
        for url in replicas.given if name not in self._infos else ():
            replica = replicas.of_url(url)
            if replica is not None:
                with suppress(RewardError):
                    exchange = Exchange(name, url, self._timeout_s)
                    self.require_same(exchange, self.declared(exchange))
                    return True
        return name in self._infos or not replicas.given

    def declared(self, exchange: Exchange) -> ServerInfo:
        """The identity that a server declares now.

        Raises:
            RewardError: no server can be there, it does not answer, or its identity is not that of the reward.
        """
        fault = server_url_fault(exchange.url)
        if fault:
            raise RewardInvalid(exchange.name, "answer", f"{exchange.where}: {fault}")
        exchange = Exchange(exchange.name, exchange.url, min(exchange.timeout_s, self._timeout_s))
        info = self._http.get(exchange, INFO_PATH, ServerInfo.from_json)
        if exchange.name in self._infos:
            self.require_same(exchange, info)
        return info

    def require_same(self, exchange: Exchange, info: ServerInfo) -> None:
        """RewardInvalid for another identity than the reward's; without a reference this one becomes it."""
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
