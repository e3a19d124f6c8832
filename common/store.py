"""Redis, for three things a run can also do without: who serves which reward, scores known already, run control.

    rtdmd:servers:REWARD            set of URLs; each is a member while its lease rtdmd:lease:REWARD:URL lives
    rtdmd:score:KEY                 float32 scores of one request; rtdmd:scores orders the keys by last use
    rtdmd:run:NAME                  "pause" or "stop", read between iterations

Redis lost is never an error of the run: each call raises StoreError, at once while Redis is known to be away, and the
caller goes on with what it knows. Values are plain bytes; never pickle.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import numpy as np
import redis

from common.errors import StoreError
from common.reward_api import FloatArray, ServerInfo

CALL_TIMEOUT_S = 0.5
"""Redis answers in under a millisecond; longer waits would cost more than it saves."""
RETRY_AFTER_S = 2.0
"""How long Redis is left alone after it was lost."""
LEASE_S = 15.0
RENEW_S = 3.0
"""A server renews its lease this often, so that a slow moment does not unlist it."""
LARGEST_ENTRY = 16_384
"""Bytes of a cached answer (4 a score): with the number of entries this bounds the memory of the cache."""
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
        return f"RedisAddress({self.url!r})"


class RedisLink:
    """A connection that may be lost and comes back by itself; thread-safe."""

    def __init__(self, address: RedisAddress, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._clock = clock
        self._away_until = 0.0
        self._lock = threading.Lock()
        self._redis = redis.Redis.from_url(
            address.url,
            username=address.username,
            password=address.password,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            retry=None,
        )

    def close(self) -> None:
        self._redis.close()

    def call(self, action: Callable[[redis.Redis], Result]) -> Result:
        """What `action` returns.

        Raises:
            StoreError: Redis does not answer, or did not a moment ago.
        """
        with self._lock:
            if self._clock() < self._away_until:
                raise StoreError(f"Redis at {self._address.url} was lost a moment ago")
        try:
            return action(self._redis)
        except (redis.RedisError, OSError) as error:
            with self._lock:
                if self._clock() >= self._away_until:
                    logger.warning("Redis at %s is lost (%s): going on without it", self._address.url, error)
                self._away_until = self._clock() + RETRY_AFTER_S
            raise StoreError(f"Redis at {self._address.url} cannot be used: {error}") from error


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
            leases = cast("list[bytes | None]", client.mget([_lease(reward, url.decode()) for url in members]))
            gone = [url for url, lease in zip(members, leases, strict=True) if lease is None]
            if gone:
                client.srem(_servers(reward), *gone)
            return tuple(url.decode() for url in members if url not in gone)

        return self._link.call(read)


class ScoreCache:
    """Answers by content, least recently used ones forgotten first; bounded in entries and in bytes of each.

    A key stands for one request: all its images, prompts and metadata, with what scores them. So a hit is, bit for bit,
    what the server answered to the very same request, and a run does not depend on what else was cached.
    """

    def __init__(self, link: RedisLink, max_entries: int) -> None:
        self._link = link
        self._max_entries = max_entries

    def get(self, key: str) -> FloatArray | None:
        """Scores float32 [B], or None when they are not known; StoreError as in `RedisLink.call`."""

        def read(client: redis.Redis) -> bytes | None:
            with client.pipeline() as pipeline:
                pipeline.get(_score(key))
                pipeline.zadd(SCORE_ORDER, {key: time.time()}, xx=True)
                found: bytes | None = pipeline.execute()[0]
                return found

        content = self._link.call(read)
        if content is None or len(content) % 4:
            return None
        return np.frombuffer(content, dtype="<f4").astype(np.float32)

    def put(self, key: str, scores_B: FloatArray) -> None:
        content = scores_B.astype("<f4").tobytes()
        if len(content) > LARGEST_ENTRY:
            return

        def write(client: redis.Redis) -> None:
            with client.pipeline() as pipeline:
                pipeline.set(_score(key), content)
                pipeline.zadd(SCORE_ORDER, {key: time.time()})
                pipeline.zcard(SCORE_ORDER)
                entries: int = pipeline.execute()[2]
            if entries > self._max_entries:
                oldest = cast("list[tuple[bytes, float]]", client.zpopmin(SCORE_ORDER, entries - self._max_entries))
                client.delete(*(_score(entry.decode()) for entry, _ in oldest))

        self._link.call(write)


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


SCORE_ORDER = "rtdmd:scores"


def request_digest(body: bytes) -> bytes:
    """sha256 of an encoded request: its images, prompts and metadata."""
    return hashlib.sha256(body).digest()


def score_key(digest: bytes, info: ServerInfo) -> str:
    """What a request's scores are filed under: the request, and everything its scores depend on."""
    parts: Sequence[str] = (info.scorer, info.version, info.weights_hash, info.preprocess_version)
    key = hashlib.sha256(digest)
    for part in parts:
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        key.update(len(part.encode()).to_bytes(4, "little") + part.encode())
    return key.hexdigest()


def _servers(reward: str) -> str:
    return f"rtdmd:servers:{reward}"


def _lease(reward: str, url: str) -> str:
    return f"rtdmd:lease:{reward}:{url}"


def _score(key: str) -> str:
    return f"rtdmd:score:{key}"
