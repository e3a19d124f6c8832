"""Access to a run's rewards: the driver creates it once; each worker and the learner open their own client from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from common.config.rewards import RewardClientConfig
from common.redis_link import RedisAddress, RedisLink
from common.rewards.api import ServerInfo
from common.rewards.cache import ScoreCache
from common.rewards.client import RewardClient, RewardEndpoint
from common.rewards.control_request import ControlRequest, Reference
from common.rewards.discovery import Discovery
from common.rewards.guard import Outage, RewardGuard
from common.rewards.registry import ServerRegistry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardAccess:
    """Everything that a process needs to use a run's rewards.

    Attributes:
        endpoints: servers named in the run file or started by the launcher.
        outages: every reward of the run, with its outage policy.
        infos: the identities that the rewards declared at the start; empty before the first request.
        controls: each reward's control request.
        references: what the rewards' servers answered to random pictures at the start; empty before that.
        run: name of the run in its requests, see `RewardHttp`.
        redis: where more servers register and cached scores are kept; None for a run without Redis.
    """

    endpoints: tuple[RewardEndpoint, ...]
    outages: Mapping[str, Outage]
    settings: RewardClientConfig
    token: str | None = field(repr=False)
    redis: RedisAddress | None
    cached_scores: int
    infos: Mapping[str, ServerInfo] = field(default_factory=dict)
    controls: Mapping[str, ControlRequest] = field(default_factory=dict)
    references: Mapping[str, Reference] = field(default_factory=dict)
    run: str | None = None

    def longest_wait_s(self) -> float:
        """Seconds that one request may take, retries and a held outage included."""
        held_s = max((outage.limit_s for outage in self.outages.values()), default=0.0)
        return held_s + (self.settings.attempts + 1) * self.settings.timeout_s

    @contextmanager
    def guard(self) -> Iterator[RewardGuard]:
        """A client with the outage policies of the run."""
        with self.client() as client:
            yield RewardGuard(client, self.outages, self.controls)

    @contextmanager
    def client(self) -> Iterator[RewardClient]:
        """A client that also uses registered servers."""
        if self.redis is None:
            with self._client(None) as client:
                yield client
            return
        with ExitStack() as stack:
            link = RedisLink(self.redis)
            stack.callback(link.close)
            cache = ScoreCache(link, self.cached_scores, self.token)
            registry = ServerRegistry(link, self.token)
            stack.callback(_report, registry, cache)
            client = stack.enter_context(self._client(cache))
            stack.enter_context(Discovery(client, registry, client.names))
            yield client

    def _client(self, cache: ScoreCache | None) -> RewardClient:
        return RewardClient(
            self.endpoints,
            self.settings.timeout_s,
            self.settings.attempts,
            self.token,
            discovered=tuple(self.outages),
            infos=self.infos,
            controls=self.controls,
            references=self.references,
            cache=cache,
            run=self.run,
        )


def _report(registry: ServerRegistry, cache: ScoreCache) -> None:
    """Log how many values were ignored; the first one has been logged with its key and the remedy."""
    if registry.ignored or cache.ignored:
        logger.warning(
            "Redis: %d registrations and %d scores without a valid signature were ignored",
            registry.ignored,
            cache.ignored,
        )
