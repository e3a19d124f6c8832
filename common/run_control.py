"""Requests to a running run through Redis: pause, stop, or another number of rollout workers.

    rtdmd:run:NAME            "pause" or "stop"
    rtdmd:run:NAME:workers    a number, such as "8"

A run reads both between iterations. With a token each also has the time, and is signed. Without one
`redis-cli SET rtdmd:run:NAME pause` makes a request and DEL withdraws it. `rtdmd control` does both in either case.
Whoever writes to Redis can delete a signed request, but neither make nor repeat one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal, cast

from common.redis_link import RedisLink
from common.signed_values import CLOCK_TOLERANCE_S, Purpose, Signer

RunRequest = Literal["pause", "stop"]
MOST_WORKERS = 4096
"""The largest number of workers that a request may name."""

logger = logging.getLogger(__name__)


class RunControl:
    """The requests to one run.

    Args:
        run: name of the run.
        token: requests are signed with it.
        clock: seconds since the epoch.
    """

    def __init__(
        self, link: RedisLink, run: str, token: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        signer, key = Signer(token, Purpose.RUN_CONTROL), f"rtdmd:run:{run}"
        self._state = _Request(link, key, signer, clock)
        self._workers = _Request(link, f"{key}:workers", signer, clock)

    def ask(self, request: RunRequest | None) -> None:
        """Request the run to pause or stop; None cancels the request. StoreError as in `RedisLink.call`."""
        self._state.write(request)

    def asked(self) -> RunRequest | None:
        """The current request; None for anything but `pause` or `stop`. StoreError as in `RedisLink.call`."""
        word = self._state.read()
        return cast("RunRequest", word.decode()) if word in (b"pause", b"stop") else None

    def ask_workers(self, count: int) -> None:
        """Request another number of rollout workers. StoreError as in `RedisLink.call`."""
        self._workers.write(str(count))

    def workers_asked(self) -> int | None:
        """The requested number of rollout workers; None for anything else. StoreError as in `RedisLink.call`."""
        word = self._workers.read() or b""
        # int() would also take signs, spaces and underscores.
        count = int(word) if word.isdigit() and len(word) <= len(str(MOST_WORKERS)) else 0
        return count if 1 <= count <= MOST_WORKERS else None


class _Request:
    """A word under a key. A signed one counts once, and not if it is from before this object."""

    def __init__(self, link: RedisLink, key: str, signer: Signer, clock: Callable[[], float]) -> None:
        self._link, self._key, self._signer, self._clock = link, key, signer, clock
        # Signed requests of this time or before it are repeated ones.
        self._over = clock() - CLOCK_TOLERANCE_S
        self._current: float | None = None
        self._said_old = False

    def write(self, word: str | None) -> None:
        """None deletes the key."""
        if word is None:
            self._link.call(lambda client: client.delete(self._key))
            return
        stamped = f"{word} {self._clock()!r}" if self._signer.signs else word
        value = self._signer.signed(self._key, stamped.encode())
        self._link.call(lambda client: client.set(self._key, value))

    def read(self) -> bytes | None:
        value = cast("bytes | None", self._link.call(lambda client: client.get(self._key)))
        payload = None if value is None else self._signer.payload(self._key, value)
        word, stamp = self._parts(payload)
        if self._current is not None and stamp != self._current:
            # The request before this one is over for good.
            self._over = max(self._over, self._current)
        self._current = stamp
        if stamp is not None and stamp <= self._over:
            self._say_old()
            return None
        return word

    def _parts(self, payload: bytes | None) -> tuple[bytes | None, float | None]:
        """The word, and the time of a signed one."""
        if payload is None or not self._signer.signs:
            return payload, None
        # A signature shows that `write` wrote the time.
        word, stamp = payload.split(b" ")
        return word, float(stamp)

    def _say_old(self) -> None:
        if not self._said_old:
            logger.warning(
                "Redis: %s is ignored: a request from before this run started, or one that was withdrawn; ask again "
                "with `rtdmd control`, from a machine whose clock is right",
                self._key,
            )
        self._said_old = True
