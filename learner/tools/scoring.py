"""Rewards of an evaluation: servers by URL, servers started for it, or the rewards of the evaluated run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.command import user_path
from common.config.rewards import RewardClientConfig
from common.config.run import Config
from common.errors import ConfigError, RewardError
from common.rewards.api import ServerInfo
from common.rewards.bearer import reward_token
from common.rewards.client import RewardClient, RewardEndpoint
from common.rewards.prompt_check import require_scorable, varied
from common.types import ByteArray, FloatArray, Prompt
from common.urls import host_of, server_url_fault, without_secrets
from learner.driver.local_servers import LocalServers, LocalServerSpec, local_specs


@dataclass(frozen=True)
class RewardChoice:
    """The rewards to score with: running servers and servers to start; `order` is that of the requested names."""

    endpoints: tuple[RewardEndpoint, ...]
    local: tuple[LocalServerSpec, ...]
    order: tuple[str, ...]


class EvaluationRewards:
    """Scores images with every reward; a missing score is an error that names its reward."""

    def __init__(self, client: RewardClient, servers: LocalServers, order: Sequence[str]) -> None:
        self._client = client
        self._servers = servers
        self._order = tuple(order)

    def introduce(self, path: Path, prompts: Sequence[Prompt]) -> dict[str, ServerInfo]:
        """Check every server's identity and that it can score the prompts of a file, before anything takes time.

        Raises:
            PromptError, RewardError: see `require_scorable`.
        """
        infos = {name: self._client.verify(name) for name in self._order}
        tried = varied(prompts)
        for name in self._order:
            require_scorable(self._client, name, path, tried)
        return infos

    def score(self, prompt: Prompt, images_GHWC: ByteArray) -> dict[str, FloatArray]:
        """Scores [G] of each reward; RewardError."""
        count = len(images_GHWC)
        try:
            return self._client.score(images_GHWC, [prompt.text] * count, [dict(prompt.metadata)] * count, self._order)
        except RewardError:
            # If one of our own servers died, its log has the reason.
            self._servers.check()
            raise


def choose(rewards: Sequence[str], scorers: Sequence[str], run: Config | None) -> RewardChoice:
    """From options `NAME=URL` and `NAME=SCORER[,MODEL_DIR]`; without any, the rewards of the run.

    Raises:
        ConfigError: an option has a wrong form, a name is used for both, or there is no reward at all.
    """
    endpoints = tuple(RewardEndpoint(*_checked_url(_pair("--reward", text, "URL"))) for text in rewards)
    local = tuple(_spec(*_pair("--scorer", text, "SCORER[,MODEL_DIR]")) for text in scorers)
    if not endpoints and not local and run is not None:
        return _of_run(run)
    order = tuple(dict.fromkeys([*(one.name for one in endpoints), *(one.name for one in local)]))
    if len(order) < len({one.name for one in endpoints}) + len(local):
        raise ConfigError(
            "--scorer: a name is used twice: give every reward its own (several --reward NAME=URL of one "
            "name are replicas)"
        )
    if not order:
        raise ConfigError("no reward: name servers with --reward NAME=URL, or start them with --scorer NAME=SCORER")
    return RewardChoice(endpoints, local, order)


@contextmanager
def started(choice: RewardChoice, log_dir: Path, timeout_s: float) -> Iterator[EvaluationRewards]:
    """Start the local servers and a client for all; everything is stopped after the block."""
    token = reward_token(host_of(endpoint.url) for endpoint in choice.endpoints)
    with LocalServers(choice.local, log_dir) as servers:
        endpoints = [*choice.endpoints, *(RewardEndpoint(name, url) for name, url in servers.urls.items())]
        with RewardClient(endpoints, timeout_s, RewardClientConfig().attempts, token) as client:
            yield EvaluationRewards(client, servers, choice.order)


def _of_run(run: Config) -> RewardChoice:
    unknown = [reward.name for reward in run.rewards if reward.url == "redis"]
    if unknown:
        raise ConfigError(
            f"the run found its reward {unknown[0]} through Redis: name its server with --reward NAME=URL"
        )
    endpoints = [RewardEndpoint(reward.name, url) for reward in run.rewards for url in reward.urls]
    local = local_specs(run.rewards)
    return RewardChoice(tuple(endpoints), tuple(local), tuple(reward.name for reward in run.rewards))


def _pair(option: str, text: str, value: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    if not (name and equals and rest):
        raise ConfigError(f"{option} {text}: write {option} NAME={value}")
    return name, rest


def _checked_url(pair: tuple[str, str]) -> tuple[str, str]:
    name, url = pair
    fault = server_url_fault(url)
    if fault:
        raise ConfigError(f"--reward {name}={without_secrets(url)}: {fault}")
    return pair


def _spec(name: str, text: str) -> LocalServerSpec:
    scorer, comma, model = text.partition(",")
    return LocalServerSpec(name, scorer, user_path(model) if comma else None)
