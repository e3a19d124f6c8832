"""Heads of requests that no service sees: too long, not HTTP/1.1, or of a meaning on which two readers could differ."""

from __future__ import annotations

from reward_servers.front.answers import Answer, error_answer
from reward_servers.front.exchange import LENGTH, TRANSFER, Exchange

MAX_PIPELINED = 64
"""A client may send this many requests ahead of their answers; with one more the connection ends."""
VERSIONS = ("1.0", "1.1")
CROWDED = error_answer(
    429,
    "overloaded",
    f"more than {MAX_PIPELINED} requests wait on this connection: use several",
    {"retry-after": "1"},
)
NO_HTTP = "the request is not valid HTTP/1.1"
NO_HOST = error_answer(400, "wire", f"{NO_HTTP}: it needs one host header")
NO_VERSION = error_answer(400, "wire", f"{NO_HTTP}: speak HTTP/1.1")
NO_UPGRADE = error_answer(400, "wire", "upgrade and CONNECT are not supported with a body: send plain HTTP/1.1")
NO_CODING = error_answer(415, "encoding", "a transfer-encoding other than chunked is not supported: send it plain")


def fault_of_head(exchange: Exchange, version: str, upgrades: bool, most_bytes: int) -> Answer | None:
    """The answer to a head that is not served, whatever its route; None for any other."""
    if exchange.head_bytes > most_bytes:
        return too_long(most_bytes)
    if version not in VERSIONS:
        return NO_VERSION
    if version == "1.1" and exchange.hosts != 1:
        return NO_HOST
    if upgrades and (exchange.fields.get(LENGTH, b"0") != b"0" or TRANSFER in exchange.fields):
        return NO_UPGRADE
    if exchange.fields.get(TRANSFER, b"chunked").lower() != b"chunked":
        return NO_CODING
    return None


def too_long(most_bytes: int) -> Answer:
    return error_answer(431, "too_large", f"the head of a request has at most {most_bytes} bytes")
