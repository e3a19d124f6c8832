"""The sections `rewards`, `reward_client` and `redis` of the run file (see `common.config.run`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from common.config.section import Section, problem
from common.types import OutagePolicy, Precision
from common.urls import redis_url_fault, server_url_fault

LONGEST_OUTAGE_S = 1500
LONGEST_REQUEST_S = 1700
"""A request must take less than the 1800 s in which a worker or the learner must finish a call."""


class RewardConfig(Section):
    """One reward and the servers that compute it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name of the reward in metrics and overrides.")
    url: str | tuple[str, ...] = Field(
        "local",
        description="local: the run starts the server. An http(s) URL, or several of identical servers: [a, b]. "
        "redis: use only servers registered at redis.url. With any other value, registered servers with identical "
        "weights are added as replicas.",
    )
    scorer: str | None = Field(None, description="Local only: hps, pickscore, ... or an import path module:Class.")
    model: Path | None = Field(None, description="Local only: the scorer's model directory.")
    weight: NonNegativeFloat = Field(1.0, description="Weight in the advantage and in the back-propagated sum.")
    differentiable: bool = Field(
        False, description="Back-propagate it through the final step. Its server must offer /v1/gradient."
    )
    evaluation_only: bool = Field(
        False,
        description="Evaluate it and never train on it. Such a reward distinguishes progress from reward hacking.",
    )
    outage: OutagePolicy = Field(
        OutagePolicy.PAUSE,
        description="Outage policy. pause: wait for the reward, at most outage_limit_s, then end the run with an "
        "error that names it. drop_group: drop groups that it could not score; an iteration without any group is "
        "sampled again for at most outage_limit_s. renormalise: train such groups on the other rewards, with "
        "weights scaled to the same sum. Dropped and renormalised groups are counted by cause. Evaluations always "
        "pause.",
    )
    outage_limit_s: float = Field(
        600.0, gt=0, le=LONGEST_OUTAGE_S, description="Longest outage that a run waits for, in seconds."
    )
    max_batch: PositiveInt = Field(16, description="Local only: images per batch of the server.")
    threads: PositiveInt = Field(1, description="Local only: CPU threads of the server.")
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:[0-9]+)?)$",
        description="Local only: cpu, cuda (the first GPU) or cuda:N, on the machine of the driver. Rewards with the "
        "same GPU and max_batch share one server. Ray does not count this use of the GPU.",
    )
    precision: Precision | None = Field(
        None,
        description="Local only: type in which the model computes. null: float32 on the CPU; on a GPU that of its "
        "published recipe, see rewards.md. It is part of the reward's identity.",
    )

    @property
    def trained(self) -> bool:
        return not self.evaluation_only and self.weight > 0

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers named in the run file; none for local and redis."""
        return self.url if isinstance(self.url, tuple) else () if self.url in ("local", "redis") else (self.url,)

    @field_validator("url")
    @classmethod
    def _urls_are_urls(cls, url: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if url in ("local", "redis"):
            return url
        urls = url if isinstance(url, tuple) else (url,)
        if not urls or len(set(urls)) < len(urls):
            raise PydanticCustomError("url", "Neither local, nor redis, nor http(s) URLs that all differ")
        for fault in filter(None, map(server_url_fault, urls)):
            raise PydanticCustomError("url", "Neither local nor redis, and {fault}", {"fault": fault})
        return url

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.url == "local" and self.scorer is None:
            raise problem("scorer", 'url is "local" but no scorer is named: set scorer, or url to a running server')
        for key, value in (("device", None if self.device == "cpu" else self.device), ("precision", self.precision)):
            if self.url != "local" and value is not None:
                raise problem(key, f"{value}, but url is not local: give --{key} to that server, and leave it out here")
        if self.evaluation_only and self.weight > 0:
            raise problem("weight", f"{self.weight:g} on an evaluation-only reward: set it to 0 or train on the reward")
        return self


class RewardClientConfig(Section):
    """Requests to reward servers."""

    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Timeout of one request, in seconds. A server that hangs, or takes five times its usual "
        "latency, counts as unhealthy long before.",
    )
    attempts: PositiveInt = Field(
        3,
        description="Attempts per request before its reward counts as out. Retries are limited to 10 % of all "
        "requests.",
    )


class RedisConfig(Section):
    """Redis: the registry of reward servers, a cache of scores, and requests to pause or stop a run."""

    url: str = Field(
        "embedded",
        description="embedded: the run starts its own Redis on loopback. none: no Redis. Or redis://HOST:PORT/DB, "
        "with credentials from REDIS_USERNAME and REDIS_PASSWORD.",
    )
    cached_scores: PositiveInt = Field(
        100_000, description="Images whose scores are cached, at most for a week. One takes about 400 bytes per reward."
    )

    @field_validator("url")
    @classmethod
    def _url_has_no_secret(cls, url: str) -> str:
        if url in ("embedded", "none"):
            return url
        fault = redis_url_fault(url)
        if "@" in url:
            fault = "A user or password would be written into files: set REDIS_USERNAME and REDIS_PASSWORD instead"
        if fault:
            raise PydanticCustomError("redis_url", "{fault}", {"fault": fault})
        return url


def check_rewards(rewards: Sequence[RewardConfig], client: RewardClientConfig, redis: RedisConfig) -> None:
    """Check the conditions between these sections."""
    trained = [reward for reward in rewards if reward.trained]
    for reward in rewards:
        if reward.url == "redis" and redis.url == "none":
            raise problem(f"rewards.{reward.name}.url", "redis, but redis.url is none: name one, or name the servers")
        if reward.url == "redis" and redis.url == "embedded":
            raise problem(
                f"rewards.{reward.name}.url",
                "redis, but redis.url is embedded, where no server can have registered before the run: name a running "
                "one, or name the servers",
            )
        # A request that is held, its last attempts, and its control request.
        longest_s = reward.outage_limit_s + (client.attempts + 1) * client.timeout_s
        if longest_s > LONGEST_REQUEST_S:
            raise problem(
                f"rewards.{reward.name}.outage_limit_s",
                f"{reward.outage_limit_s:g}: with reward_client.attempts = {client.attempts} of {client.timeout_s:g} s "
                f"a request could take {longest_s:g} s, and a run gives up on workers soon after "
                f"{LONGEST_REQUEST_S} s: lower one of the three",
            )
        if reward.trained and reward.outage.leaves_reward_out and len(trained) == 1:
            raise problem(
                f"rewards.{reward.name}.outage",
                f"{reward.outage}, but no other reward is trained on: {OutagePolicy.PAUSE} or "
                f"{OutagePolicy.DROP_GROUP}",
            )
