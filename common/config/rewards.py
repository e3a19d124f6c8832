"""The sections of the run file about rewards: which, from whom, and how they are asked (see `common.config.run`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from common.config.section import Section, problem

SERVER_URL = re.compile(r"https?://\S+")
LONGEST_OUTAGE_S = 1500
LONGEST_QUESTION_S = 1700
"""Less than the 1800 s after which a run gives up on workers that finish nothing."""


class RewardConfig(Section):
    """One reward and the servers that compute it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Its name in metrics and overrides.")
    url: str | tuple[str, ...] = Field(
        "local",
        description="local: the launcher starts the server. An http(s) URL, or several of equal servers: [a, b]. "
        "redis: those registered at redis.url, and only those; others are joined by registered equal ones.",
    )
    scorer: str | None = Field(None, description="Local only: hps, pickscore, ... or an import path module:Class.")
    model: Path | None = Field(None, description="Local only: the scorer's model directory.")
    weight: NonNegativeFloat = Field(1.0, description="Weight in the advantage and in the back-propagated sum.")
    differentiable: bool = Field(False, description="Back-propagate it through the final step (needs /v1/gradient).")
    evaluation_only: bool = Field(False, description="Measured, never trained on: tells progress from reward hacking.")
    outage: Literal["pause", "drop_group", "renormalise"] = Field(
        "pause",
        description="When it cannot be had. pause: hold until it is back, at most outage_limit_s, then end the run by "
        "name. drop_group: drop the groups it could not score whole; an iteration left without any is sampled again "
        "for at most outage_limit_s. renormalise: train such groups on the other rewards, their weights scaled to the "
        "same sum. Dropped and renormalised groups are counted by cause. Evaluations always pause.",
    )
    outage_limit_s: float = Field(600.0, gt=0, le=LONGEST_OUTAGE_S, description="Seconds an outage may hold the run.")
    max_batch: PositiveInt = Field(16, description="Local only: images per batch of the server.")
    threads: PositiveInt = Field(1, description="Local only: CPU threads of the server.")

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
        if not urls or len(set(urls)) < len(urls) or not all(SERVER_URL.fullmatch(one) for one in urls):
            raise PydanticCustomError("url", "Neither local, nor redis, nor http(s) URLs that all differ")
        return url

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.url == "local" and self.scorer is None:
            raise problem("scorer", 'url is "local" but no scorer is named: set scorer, or url to a running server')
        if self.evaluation_only and self.weight > 0:
            raise problem("weight", f"{self.weight:g} on an evaluation-only reward: set it to 0 or train on the reward")
        return self


class RewardClientConfig(Section):
    """How workers and learner ask the reward servers."""

    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds one request may take at most. A server that hangs, or takes five times as long as is "
        "usual for it, counts as out long before.",
    )
    attempts: PositiveInt = Field(
        3, description="Tries of a request, within a budget of 10 % extra requests, before its reward counts as out."
    )
    trusted_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts that may be sent the bearer token though they only registered in Redis; those of "
        "rewards.*.url and loopback may in any case.",
    )


class RedisConfig(Section):
    """Redis: registered reward servers, scores known already, and requests to pause or stop a run."""

    url: str = Field(
        "embedded",
        pattern=r"^(embedded|none|rediss?://[^@\s]+)$",
        description="embedded: the launcher starts one on loopback, for this run. none: do without. Or redis://HOST:PORT/"
        "DB; credentials come from REDIS_USERNAME and REDIS_PASSWORD.",
    )
    cached_scores: PositiveInt = Field(
        100_000, description="Images whose scores are remembered, about 400 bytes each and reward, for a week at most."
    )


def check_rewards(rewards: Sequence[RewardConfig], client: RewardClientConfig, redis: RedisConfig) -> None:
    """What must hold between these sections."""
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
        # A question that is held, its last attempts, and one more to tell whose fault a failure is.
        longest_s = reward.outage_limit_s + (client.attempts + 1) * client.timeout_s
        if longest_s > LONGEST_QUESTION_S:
            raise problem(
                f"rewards.{reward.name}.outage_limit_s",
                f"{reward.outage_limit_s:g}: with reward_client.attempts = {client.attempts} of {client.timeout_s:g} s "
                f"a question could take {longest_s:g} s, and a run gives up on workers soon after "
                f"{LONGEST_QUESTION_S} s: lower one of the three",
            )
        if reward.trained and reward.outage == "renormalise" and len(trained) == 1:
            raise problem(
                f"rewards.{reward.name}.outage", "renormalise, but no other reward is trained on: pause or drop_group"
            )
