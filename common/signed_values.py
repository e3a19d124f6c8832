"""Signed values for a store that others can write to: HMAC-SHA256 with a key that only holders of the token have.

    value = signature (32 bytes) + payload
    signature = HMAC(key of the purpose, length of the name + name + payload)

The name is the value's key in the store, so a value that is copied to another key is not believed there. Without a
token a value is its payload, and every value is believed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from enum import StrEnum
from functools import lru_cache

from common.rewards.bearer import REWARD_TOKEN

SIGNATURE_BYTES = 32
STRETCHES = 100_000
"""Rounds of PBKDF2 between token and key: who reads the store can try tokens only this much more slowly."""
CLOCK_TOLERANCE_S = 120.0
"""Time stamps of other machines may differ by this much from ours; an older value counts as a repeated one."""

logger = logging.getLogger(__name__)


class Purpose(StrEnum):
    """Kinds of signed values; each has its own key."""

    REGISTRATION = "registration of a reward server"
    SCORE = "cached score"
    RUN_CONTROL = "request to a run"


REMEDIES = {
    Purpose.REGISTRATION: f"start its server with the {REWARD_TOKEN} of this run",
    Purpose.SCORE: f"give all runs that share this Redis one {REWARD_TOKEN}, or a database each",
    Purpose.RUN_CONTROL: f"use `rtdmd control` with the {REWARD_TOKEN} of the run",
}


class Signer:
    """Signs values of one purpose and reads them; thread-safe.

    Attributes:
        ignored: number of values that were read and had no valid signature.
    """

    def __init__(self, token: str | None, purpose: Purpose) -> None:
        self._key = None if token is None else hmac.digest(_stretched(token), purpose.encode(), "sha256")
        self._purpose = purpose
        self._lock = threading.Lock()
        self.ignored = 0

    @property
    def signs(self) -> bool:
        """Whether there is a token."""
        return self._key is not None

    def signed(self, name: str, payload: bytes) -> bytes:
        """The value to store under `name`."""
        return payload if self._key is None else _signature(self._key, name, payload) + payload

    def payload(self, name: str, value: bytes) -> bytes | None:
        """The payload of a value that was read under `name`; None, logged once, without a valid signature."""
        if self._key is None:
            return value
        signature, payload = value[:SIGNATURE_BYTES], value[SIGNATURE_BYTES:]
        if hmac.compare_digest(signature, _signature(self._key, name, payload)):
            return payload
        self._ignore(name)
        return None

    def _ignore(self, name: str) -> None:
        with self._lock:
            self.ignored += 1
            first = self.ignored == 1
        if first:
            logger.warning(
                "Redis: %r is ignored, as are others like it: a %s that is not signed with this %s; %s, and find out "
                "who else writes to this Redis",
                name,
                self._purpose.value,
                REWARD_TOKEN,
                REMEDIES[self._purpose],
            )


@lru_cache(maxsize=8)
def _stretched(token: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", token.encode(), b"rtdmd: values in Redis", STRETCHES)


def _signature(key: bytes, name: str, payload: bytes) -> bytes:
    # The length distinguishes ("ab", "c") from ("a", "bc").
    named = name.encode(errors="replace")
    return hmac.digest(key, len(named).to_bytes(8, "little") + named + payload, "sha256")
