"""Registry of reward servers in Redis.

    rtdmd:servers:REWARD        set of URLs
    rtdmd:lease:REWARD:URL      a URL is registered while its lease is alive: time of the renewal; signed with a token

Whoever can write to Redis can write this. So only URLs of one form are read, a bounded number of them, and with a token
only those whose lease is signed and recent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import cast

import redis

from common.redis_link import RedisLink
from common.signed_values import CLOCK_TOLERANCE_S, Purpose, Signer
from common.urls import registered_url_fault, without_secrets

LEASE_S = 15.0
RENEW_S = 3.0
"""A server renews its lease at this interval, several times per lease, so that a short delay does not unregister it."""
LARGEST_SAMPLE = 1024
"""At most this many members of a reward's set are looked at; of a larger set a random sample."""
MOST_SERVERS = 64
"""At most this many servers of a reward are used. Those that were used before come first."""

logger = logging.getLogger(__name__)


class ServerRegistry:
    """Registered reward servers by reward name. A server stays registered as long as it renews its lease.

    Args:
        token: registrations are signed with it, and others are ignored.
        clock: seconds since the epoch.
    """

    def __init__(self, link: RedisLink, token: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._link = link
        self._signer = Signer(token, Purpose.REGISTRATION)
        self._clock = clock
        self._used: dict[str, tuple[str, ...]] = {}
        self._complaints: set[tuple[str, str]] = set()

    @property
    def signs(self) -> bool:
        """Whether a listed server has shown that it knows the token."""
        return self._signer.signs

    @property
    def ignored(self) -> int:
        """Number of registrations that were read and had no valid signature."""
        return self._signer.ignored

    def register(self, reward: str, url: str) -> None:
        """Register a server, or renew its lease; StoreError as in `RedisLink.call`."""
        lease = _lease(reward, url)
        value = self._signer.signed(lease, repr(self._clock()).encode())

        def write(client: redis.Redis) -> None:
            with client.pipeline() as pipeline:
                pipeline.sadd(_servers(reward), url)
                pipeline.set(lease, value, px=int(1000 * LEASE_S))
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
        """The servers registered now, sorted; those with an expired lease are removed."""
        used = self._used.get(reward, ())
        total, leases = self._read(reward, used)
        if total > LARGEST_SAMPLE:
            self._complain(reward, "many", f"has {total} entries, of which {LARGEST_SAMPLE} are looked at: delete it")
        found = [url for url, lease in leases.items() if self._is_server(reward, url, lease)]
        if len(found) > MOST_SERVERS:
            self._complain(reward, "used", f"has {len(found)} servers, of which {MOST_SERVERS} are used")
        found = sorted(found, key=lambda url: (url not in used, url))[:MOST_SERVERS]
        self._used[reward] = tuple(sorted(found))
        return self._used[reward]

    def _read(self, reward: str, used: tuple[str, ...]) -> tuple[int, dict[str, bytes]]:
        """The size of the reward's set, and the living leases of those in it that are looked at, by URL."""
        servers = _servers(reward)

        def read(client: redis.Redis) -> tuple[int, dict[str, bytes]]:
            total = client.scard(servers)
            sample = cast("list[bytes]", client.srandmember(servers, LARGEST_SAMPLE))
            members = list(dict.fromkeys((*sample, *(url.encode() for url in used))))
            if not members:
                return 0, {}
            # A member that is not text was written by another program and has no lease.
            texts = [member.decode(errors="replace") for member in members]
            leases = cast("list[bytes | None]", client.mget([_lease(reward, url) for url in texts]))
            gone = [member for member, lease in zip(members, leases, strict=True) if lease is None]
            if gone:
                client.srem(servers, *gone)
            return total, {url: lease for url, lease in zip(texts, leases, strict=True) if lease is not None}

        return self._link.call(read)

    def _is_server(self, reward: str, url: str, lease: bytes) -> bool:
        fault = registered_url_fault(url)
        if fault:
            self._complain(reward, "form", f"has {without_secrets(url)[:100]!r}, which is ignored: {fault}")
            return False
        payload = self._signer.payload(_lease(reward, url), lease)
        if payload is None:
            return False
        # The signature shows that `register` wrote the time. Without a token nothing would.
        age_s = self._clock() - float(payload) if self._signer.signs else 0.0
        if abs(age_s) > LEASE_S + CLOCK_TOLERANCE_S:
            about = f"its registration is {age_s:.0f} s old: another program repeats it, or clocks must be synchronised"
            self._complain(reward, "old", f"has {url}, which is ignored: {about}")
            return False
        return True

    def _complain(self, reward: str, kind: str, complaint: str) -> None:
        """Log the first complaint of a kind."""
        if (reward, kind) not in self._complaints:
            logger.warning("Redis: %s %s", _servers(reward), complaint)
        self._complaints.add((reward, kind))


def _servers(reward: str) -> str:
    return f"rtdmd:servers:{reward}"


def _lease(reward: str, url: str) -> str:
    return f"rtdmd:lease:{reward}:{url}"
