"""Redis, for three optional services: reward server registry, score cache, run control.

    rtdmd:servers:REWARD, rtdmd:lease:REWARD:URL    see `common.rewards.registry`
    rtdmd:score:KEY, rtdmd:scores                   see `common.rewards.cache`
    rtdmd:run:NAME                                  see `common.run_control`

Losing Redis never fails a run: each call raises StoreError, at once while Redis is known to be down, and the caller
continues with what it has. Values are plain bytes, never pickle. Nothing in Redis is trusted: with a token, values are
signed (`common.signed_values`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import redis

from common.credentials import credential
from common.errors import ConfigError, StoreError, one_line
from common.urls import redis_url_fault, without_secrets

CALL_TIMEOUT_S = 0.5
"""Redis answers in under a millisecond; a longer wait would cost more than Redis saves."""
RETRY_AFTER_S = 2.0
"""Redis is not contacted again for this long after it was lost."""
MOST_REFUSALS = 16
"""So many different refusals are logged."""
PIPELINE_ERROR = "caused error: "
USERNAME = "REDIS_USERNAME"
PASSWORD = "REDIS_PASSWORD"
"""Environment variables with the credentials of Redis, if it requires any; run files never contain them."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RedisAddress:
    """The address of Redis and the credentials for it."""

    url: str
    username: str | None = None
    password: str | None = None

    @classmethod
    def from_environment(cls, url: str) -> RedisAddress:
        """ConfigError, without the value, for credentials that are no text."""
        return cls(url, _from_environment(USERNAME), _from_environment(PASSWORD))

    def __repr__(self) -> str:
        return f"RedisAddress({self.shown!r})"

    @property
    def shown(self) -> str:
        """The URL without secrets."""
        return without_secrets(self.url)

    def connect(self) -> redis.Redis:
        """Create a client; nothing is sent yet. ValueError when the URL is not valid for Redis."""
        scheme, separator, rest = self.url.partition("://")
        return redis.Redis.from_url(
            scheme.lower() + separator + rest,  # redis knows schemes in small letters alone
            username=self.username,
            password=self.password,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            retry=None,
        )

    def check(self, setting: str) -> None:
        """ConfigError naming `setting` for a URL that the client of Redis does not take; nothing is sent."""
        fault = redis_url_fault(self.url)
        if fault:
            raise ConfigError(f"{setting} {self.shown}: {fault}")
        try:
            with self.connect() as client:
                client.connection_pool.make_connection()
                if client.get_encoder().decode_responses:
                    raise ValueError("decode_responses: values here are bytes")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{setting} {self.shown}: its query cannot be used: {one_line(error)}") from error

    def require(self, setting: str, remedy: str) -> None:
        """ConfigError naming `setting` unless Redis answers and accepts the credentials."""
        self.check(f"{setting} =")
        try:
            with self.connect() as client:
                client.ping()
        except redis.AuthenticationError as error:
            raise ConfigError(f"{setting} = {self.shown}: {_refusal(error)}") from error
        except (redis.RedisError, OSError) as error:
            raise ConfigError(f"{setting} = {self.shown}: no Redis that can be used: {error}; {remedy}") from error


def _from_environment(name: str) -> str | None:
    value = credential(os.environ.get(name))
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not text in UTF-8: change it") from None
    return value


def _refusal(error: redis.AuthenticationError) -> str:
    return f"it refuses the user or password ({error}): set {USERNAME} and {PASSWORD} to those of this Redis"


class RedisLink:
    """A connection that reconnects by itself; thread-safe. Each loss and each recovery is logged once.

    So is each refusal: a Redis that is read-only or full refuses writes and answers reads, again and again.
    """

    def __init__(self, address: RedisAddress, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._clock = clock
        self._away_until = 0.0
        self._complaint = ""
        self._refusals: set[str] = set()
        self._lock = threading.Lock()
        self._redis = address.connect()

    def close(self) -> None:
        self._redis.close()

    def call(self, action: Callable[[redis.Redis], Result]) -> Result:
        """Return the result of `action`.

        Raises:
            StoreError: Redis does not answer, or did not answer a moment ago.
        """
        with self._lock:
            if self._clock() < self._away_until:
                raise StoreError(f"Redis at {self._address.shown} was lost a moment ago")
        try:
            result = action(self._redis)
        except redis.ResponseError as error:
            # Redis is up but refuses (read-only, out of memory, a key of another type, no permission).
            self._note("")
            self._note_refusal(one_line(error))
            raise StoreError(f"Redis at {self._address.shown} refuses: {error}") from error
        except (redis.RedisError, OSError) as error:
            with self._lock:
                self._away_until = self._clock() + RETRY_AFTER_S
            reason = _refusal(error) if isinstance(error, redis.AuthenticationError) else error
            self._note(f"Redis at {self._address.shown} is lost ({reason}): continuing without it")
            raise StoreError(f"Redis at {self._address.shown} cannot be used: {error}") from error
        self._note("")
        return result

    def _note_refusal(self, refusal: str) -> None:
        """Log the first refusal for a reason. Of a pipeline the client's message begins with the command."""
        reason = refusal.rpartition(PIPELINE_ERROR)[2]
        with self._lock:
            known = reason in self._refusals or len(self._refusals) >= MOST_REFUSALS
            self._refusals.add(reason)
        if not known:
            remedy = "continuing without what it refuses; correct it, or name another Redis"
            logger.warning("Redis at %s refuses: %s: %s", self._address.shown, refusal, remedy)

    def _note(self, complaint: str) -> None:
        """Log a change: the first problem, or the end of all problems."""
        with self._lock:
            before, self._complaint = self._complaint, complaint
        if complaint and not before:
            logger.warning("%s", complaint)
        elif before and not complaint:
            logger.warning("Redis at %s answers again", self._address.shown)
