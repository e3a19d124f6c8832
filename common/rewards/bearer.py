"""Bearer tokens: read once, as an HTTP header can carry them, and never shown."""

from __future__ import annotations

import os
import re

from common.credentials import credential
from common.errors import ConfigError

REWARD_TOKEN = "REWARD_SERVER_TOKEN"
"""Environment variable with the bearer token for servers that are not on loopback; its value is never written."""
PRINTABLE = re.compile(r"[ -~]+")


def reward_token() -> str | None:
    """The token of the environment; see `bearer_token`."""
    return bearer_token(os.environ.get(REWARD_TOKEN), REWARD_TOKEN)


def bearer_token(text: str | None, source: str) -> str | None:
    """The token as `credential` reads it.

    Raises:
        ConfigError: an HTTP header cannot carry it; the message names `source`, without the value.
    """
    token = credential(text)
    if token is None:
        return None
    if not PRINTABLE.fullmatch(token):
        raise ConfigError(
            f"{source} has characters that no HTTP header can carry, such as a line end: use printable ASCII alone"
        )
    return token
