"""Requests to a running run through Redis: pause or stop.

    rtdmd:run:NAME      "pause" or "stop", read between iterations; with a token also the time, and signed

Without a token `redis-cli SET rtdmd:run:NAME pause` (or stop) makes a request and DEL withdraws it. `rtdmd control`
does both in either case. Whoever writes to Redis can delete a signed request, but neither make nor repeat one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal, cast

from common.redis_link import RedisLink
from common.signed_values import CLOCK_TOLERANCE_S, Purpose, Signer

RunRequest = Literal["pause", "stop"]

logger = logging.getLogger(__name__)


class RunControl:
    """The request to one run.

    Args:
        run: name of the run.
        token: requests are signed with it.
        clock: seconds since the epoch.
    """

    def __init__(
        self, link: RedisLink, run: str, token: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._link = link
        self._key = f"rtdmd:run:{run}"
        self._signer = Signer(token, Purpose.RUN_CONTROL)
        self._clock = clock
        # Signed requests of this time or before it are repeated ones.
        self._over = clock() - CLOCK_TOLERANCE_S
        self._current: float | None = None
        self._said_old = False

    def ask(self, request: RunRequest | None) -> None:
        """Request the run to pause or stop; None cancels the request. StoreError as in `RedisLink.call`."""
        if request is None:
            self._link.call(lambda client: client.delete(self._key))
            return
        stamped = f"{request} {self._clock()!r}" if self._signer.signs else request
        value = self._signer.signed(self._key, stamped.encode())
        self._link.call(lambda client: client.set(self._key, value))

    def asked(self) -> RunRequest | None:
        """The current request; None for anything but `pause` or `stop`. StoreError as in `RedisLink.call`."""
        value = cast("bytes | None", self._link.call(lambda client: client.get(self._key)))
        payload = None if value is None else self._signer.payload(self._key, value)
        request, stamp = self._read(payload)
        if self._current is not None and stamp != self._current:
            # The request before this one is over for good.
            self._over = max(self._over, self._current)
        self._current = stamp
        if stamp is not None and stamp <= self._over:
            self._say_old()
            return None
        return request

    def _read(self, payload: bytes | None) -> tuple[RunRequest | None, float | None]:
        """The request, and the time of a signed one."""
        if payload is None:
            return None, None
        # A signature shows that `ask` wrote the time.
        word, stamp = payload.split(b" ") if self._signer.signs else (payload, None)
        request = cast("RunRequest", word.decode()) if word in (b"pause", b"stop") else None
        return request, None if stamp is None else float(stamp)

    def _say_old(self) -> None:
        if not self._said_old:
            logger.warning(
                "Redis: %s is ignored: a request from before this run started, or one that was withdrawn; ask again "
                "with `rtdmd control`, from a machine whose clock is right",
                self._key,
            )
        self._said_old = True
