"""Bearer tokens, read in one way by servers, clients and commands: as an HTTP header can carry them, never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from common.credentials import credential
from common.errors import ConfigError
from common.urls import is_loopback

REWARD_TOKEN = "REWARD_SERVER_TOKEN"
"""Environment variable with the bearer token for servers that are not on loopback; its value is never written."""
QUOTED = re.compile(r"([\"']).*\1")
PRINTABLE = re.compile(r"[ -~]+")
SHORTEST = 16
"""A token that other machines may try to guess has at least this many characters."""


def reward_token(hosts: Iterable[str] = ()) -> str | None:
    """The token of the environment; see `bearer_token`."""
    return bearer_token(os.environ.get(REWARD_TOKEN), REWARD_TOKEN, hosts)


def bearer_token(text: str | None, source: str, hosts: Iterable[str] = ()) -> str | None:
    """The token as `credential` reads it.

    Args:
        hosts: where it is used: the host that a server listens on, or those that a client may send it to.

    Raises:
        ConfigError: an HTTP header cannot carry it, it has quotes around it, or it is too short for a host that is not
            loopback; the message names `source`, without the value.
    """
    token = credential(text)
    if token is None:
        return None
    if not PRINTABLE.fullmatch(token):
        raise ConfigError(
            f"{source} has characters that no HTTP header can carry, such as a line end: use printable ASCII alone"
        )
    if QUOTED.fullmatch(token):
        raise ConfigError(
            f"{source} has quotes around it, which are a part of it (docker --env-file keeps them): remove them"
        )
    outside = next((host for host in hosts if not is_loopback(host)), None)
    if outside is not None and len(token) < SHORTEST:
        raise ConfigError(
            f"{source} is too short for {outside}, which other machines reach: use at least {SHORTEST} characters, "
            "such as those of `openssl rand -hex 16`"
        )
    return token
