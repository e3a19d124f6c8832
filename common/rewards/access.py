"""How the processes of one run reach its rewards: told once by the driver, opened by each worker and by the learner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from common.config.rewards import RewardClientConfig
from common.redis_link import RedisAddress, RedisLink, ServerRegistry
from common.rewards.api import ServerInfo
from common.rewards.cache import ScoreCache
from common.rewards.client import RewardClient, RewardEndpoint
from common.rewards.control_request import PlainQuestion
from common.rewards.discovery import Discovery
from common.rewards.guard import Outage, RewardGuard

REWARD_TOKEN = "REWARD_SERVER_TOKEN"
"""Environment variable with the bearer token of reward servers that are not on loopback; never written anywhere."""


@dataclass(frozen=True)
class RewardAccess:
    """Everything needed to ask the rewards of a run.

    Attributes:
        endpoints: servers named in the run file or started by the launcher.
        outages: every reward of the run, and what to do when it is out.
        infos: what the rewards declared at the start; empty before anybody has asked.
        plain: what each reward answered at the start.
        redis: where more servers register and known scores are kept; None for a run without.
    """

    endpoints: tuple[RewardEndpoint, ...]
    outages: Mapping[str, Outage]
    settings: RewardClientConfig
    token: str | None = field(repr=False)
    redis: RedisAddress | None
    cached_scores: int
    infos: Mapping[str, ServerInfo] = field(default_factory=dict)
    plain: Mapping[str, PlainQuestion] = field(default_factory=dict)

    @contextmanager
    def guard(self) -> Iterator[RewardGuard]:
        """A client with the outage policies of the run."""
        with self.client() as client:
            yield RewardGuard(client, self.outages, self.plain)

    @contextmanager
    def client(self) -> Iterator[RewardClient]:
        """A client that knows registered servers too."""
        with ExitStack() as stack:
            link = None
            if self.redis is not None:
                link = RedisLink(self.redis)
                stack.callback(link.close)
            client = stack.enter_context(
                RewardClient(
                    self.endpoints,
                    self.settings.timeout_s,
                    self.settings.attempts,
                    self.token,
                    trusted_hosts=self.settings.trusted_hosts,
                    discovered=tuple(self.outages),
                    infos=self.infos,
                    cache=None if link is None else ScoreCache(link, self.cached_scores),
                )
            )
            if link is not None:
                stack.enter_context(Discovery(client, ServerRegistry(link), client.names))
            yield client
