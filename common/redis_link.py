"""Redis, for three things a run can also do without: who serves which reward, scores known already, run control.

    rtdmd:servers:REWARD            set of URLs; each is a member while its lease rtdmd:lease:REWARD:URL lives
    rtdmd:score:KEY, rtdmd:scores   see `common.rewards.cache`
    rtdmd:run:NAME                  "pause" or "stop", read between iterations

Redis lost is never an error of the run: each call raises StoreError, at once while Redis is known to be away, and the
caller goes on with what it knows. Values are plain bytes; never pickle.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import redis

from common.errors import ConfigError, StoreError
from common.urls import without_secrets

CALL_TIMEOUT_S = 0.5
"""Redis answers in under a millisecond; longer waits would cost more than it saves."""
RETRY_AFTER_S = 2.0
"""How long Redis is left alone after it was lost."""
LEASE_S = 15.0
RENEW_S = 3.0
"""A server renews its lease this often, so that a slow moment does not unlist it."""
USERNAME = "REDIS_USERNAME"
PASSWORD = "REDIS_PASSWORD"
"""Environment variables with the credentials of Redis, if it wants any; they stand in no run file."""

RunRequest = Literal["pause", "stop"]
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is, and the credentials to use there."""

    url: str
    username: str | None = None
    password: str | None = None

    @classmethod
    def from_environment(cls, url: str) -> RedisAddress:
        return cls(url, os.environ.get(USERNAME), os.environ.get(PASSWORD))

    def __repr__(self) -> str:
        return f"RedisAddress({self.shown!r})"

    @property
    def shown(self) -> str:
        """The URL without anything secret."""
        return without_secrets(self.url)

    def connect(self) -> redis.Redis:
        """A client of it; nothing is sent yet. ValueError when the URL is none that Redis knows."""
        return redis.Redis.from_url(
            self.url,
            username=self.username,
            password=self.password,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            retry=None,
        )

    def require(self, setting: str, remedy: str) -> None:
        """ConfigError naming `setting` unless Redis answers there, to these credentials."""
        try:
            with self.connect() as client:
                client.ping()
        except (redis.RedisError, OSError, ValueError) as error:
            raise ConfigError(f"{setting} = {self.shown}: no Redis that can be used: {error}; {remedy}") from error


class RedisLink:
    """A connection that may be lost and comes back by itself; thread-safe. Said in the log once each time."""

    def __init__(self, address: RedisAddress, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._clock = clock
        self._away_until = 0.0
        self._complaint = ""
        self._lock = threading.Lock()
        self._redis = address.connect()

    def close(self) -> None:
        self._redis.close()

    def call(self, action: Callable[[redis.Redis], Result]) -> Result:
        """What `action` returns.

        Raises:
            StoreError: Redis does not answer, or did not a moment ago.
        """
        with self._lock:
            if self._clock() < self._away_until:
                raise StoreError(f"Redis at {self._address.shown} was lost a moment ago")
        try:
            result = action(self._redis)
        except redis.ResponseError as error:
            # It is there, but does not do this (out of memory, a key of another kind, no right to it).
            self._note(f"Redis at {self._address.shown} refuses: {error}")
            raise StoreError(f"Redis at {self._address.shown} refuses: {error}") from error
        except (redis.RedisError, OSError) as error:
            with self._lock:
                self._away_until = self._clock() + RETRY_AFTER_S
            self._note(f"Redis at {self._address.shown} is lost ({error}): going on without it")
            raise StoreError(f"Redis at {self._address.shown} cannot be used: {error}") from error
        self._note("")
        return result

    def _note(self, complaint: str) -> None:
        """Log what has changed: a first complaint, or the end of them."""
        with self._lock:
            before, self._complaint = self._complaint, complaint
        if complaint and not before:
            logger.warning("%s", complaint)
        elif before and not complaint:
            logger.warning("Redis at %s answers again", self._address.shown)


class ServerRegistry:
    """Reward servers by the name of their reward. A server is listed as long as it renews its lease."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def register(self, reward: str, url: str) -> None:
        """List a server, or renew its lease; StoreError as in `RedisLink.call`."""

        def write(client: redis.Redis) -> None:
            with client.pipeline() as pipeline:
                pipeline.sadd(_servers(reward), url)
                pipeline.set(_lease(reward, url), b"", px=int(1000 * LEASE_S))
                pipeline.execute()

        self._link.call(write)

    def deregister(self, reward: str, url: str) -> None:
        def write(client: redis.Redis) -> None:
            with client.pipeline() as pipeline:
                pipeline.srem(_servers(reward), url)
                pipeline.delete(_lease(reward, url))
                pipeline.execute()

        self._link.call(write)

    def urls(self, reward: str) -> tuple[str, ...]:
        """The servers listed now, sorted; those whose lease ran out are forgotten."""

        def read(client: redis.Redis) -> tuple[str, ...]:
            members = sorted(cast("set[bytes]", client.smembers(_servers(reward))))
            if not members:
                return ()
            # What is no text was put there by somebody else: it has no lease either.
            leases = cast("list[bytes | None]", client.mget([_lease(reward, _text(url)) for url in members]))
            gone = [url for url, lease in zip(members, leases, strict=True) if lease is None]
            if gone:
                client.srem(_servers(reward), *gone)
            return tuple(_text(url) for url in members if url not in gone)

        return self._link.call(read)


class RunControl:
    """What a person asks of a running run: `redis-cli SET rtdmd:run:NAME pause` (or stop), DEL to go on."""

    def __init__(self, link: RedisLink, run: str) -> None:
        self._link = link
        self._key = f"rtdmd:run:{run}"

    def ask(self, request: RunRequest | None) -> None:
        """Ask the run to pause or to stop; None takes it back."""
        if request is None:
            self._link.call(lambda client: client.delete(self._key))
        else:
            self._link.call(lambda client: client.set(self._key, request))

    def asked(self) -> RunRequest | None:
        """What is asked for; None also for words that mean nothing. StoreError as in `RedisLink.call`."""
        value = self._link.call(lambda client: client.get(self._key))
        return cast("RunRequest", value.decode()) if value in (b"pause", b"stop") else None


def _servers(reward: str) -> str:
    return f"rtdmd:servers:{reward}"


def _lease(reward: str, url: str) -> str:
    return f"rtdmd:lease:{reward}:{url}"


def _text(content: bytes) -> str:
    return content.decode(errors="replace")
