"""One HTTP exchange with a reward server. Every failure is a RewardError of the reward that was asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import httpx

from common.errors import (
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
    WireError,
)
from common.reward_api import CAUSES, DEADLINE_HEADER, MEDIA_TYPE
from common.wire import DEFAULT_MAX_BYTES

# Shorter than the servers keep an idle connection, so that none is used just as it is closed.
KEEP_ALIVE_SECONDS = 30.0
OVERLOADED = 429
SERVER_ERRORS = 500
# What a server found wrong with its own scorer's answer: the same images would give it again.
INVALID_ANSWERS = ("nan", "count", "shape", "dtype")
DEFAULT_CAUSE_OF_STATUS = {401: "unauthorized", 404: "not_found", 413: "too_large", 422: "request", 429: "overloaded"}

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Exchange:
    """Where a request goes: the reward asked for, the base URL of its server, the seconds it may take."""

    name: str
    url: str
    timeout_s: float

    @property
    def where(self) -> str:
        return f"reward {self.name} at {self.url}"


class RewardHttp:
    """Pooled connections to any number of servers; thread-safe."""

    def __init__(self, token: str | None, timeout_s: float) -> None:
        headers = {"accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS)
        # Reward servers are named in full: a proxy set for the outside world is not asked.
        self._http = httpx.Client(headers=headers, limits=limits, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def get(self, exchange: Exchange, path: str, read: Callable[[bytes], Answer]) -> Answer:
        return self._exchange(exchange, "GET", path, None, read)

    def post(self, exchange: Exchange, path: str, body: bytes, read: Callable[[bytes], Answer]) -> Answer:
        return self._exchange(exchange, "POST", path, body, read)

    def _exchange(
        self, exchange: Exchange, method: str, path: str, body: bytes | None, read: Callable[[bytes], Answer]
    ) -> Answer:
        status, headers, content = self._send(exchange, method, path, body)
        if status != httpx.codes.OK:
            raise _error_of_status(exchange, status, headers, content)
        try:
            return read(content)
        except WireError as error:
            raise RewardInvalid(exchange.name, "wire", f"{exchange.where}: {error}") from error
        except RewardError as error:
            raise RewardInvalid(exchange.name, error.cause, f"{exchange.where}: {error}") from error

    def _send(
        self, exchange: Exchange, method: str, path: str, body: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        # httpx bounds each read, not their sum: a server that drips bytes would hold us for ever.
        deadline = time.monotonic() + exchange.timeout_s
        name, headers = exchange.name, {DEADLINE_HEADER: f"{exchange.timeout_s:g}"}
        if body is not None:
            headers["content-type"] = MEDIA_TYPE
        content = bytearray()
        try:
            with self._http.stream(
                method, exchange.url + path, content=body, headers=headers, timeout=exchange.timeout_s
            ) as response:
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > DEFAULT_MAX_BYTES:
                        message = f"{exchange.where}: the answer exceeds {DEFAULT_MAX_BYTES} bytes"
                        raise RewardInvalid(name, "answer", message)
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer came too slowly")
                return response.status_code, response.headers, bytes(content)
        except httpx.TimeoutException as error:
            message = f"{exchange.where}: no answer within {exchange.timeout_s:g} s: raise reward_client.timeout_s?"
            raise RewardUnavailable(name, "timeout", message) from error
        except httpx.ConnectError as error:
            message = f"{exchange.where}: {error}: is the server running?"
            raise RewardUnavailable(name, "refused", message) from error
        except httpx.TransportError as error:
            message = f"{exchange.where}: the connection broke: {error!r}"
            raise RewardUnavailable(name, "disconnected", message) from error


def _error_of_status(exchange: Exchange, status: int, headers: Mapping[str, str], content: bytes) -> RewardError:
    """The error a server answered, with the cause it named if that is one we know."""
    cause, detail = _error_body(content)
    if cause not in CAUSES:
        cause = DEFAULT_CAUSE_OF_STATUS.get(status, "answer")
    message = f"{exchange.where} answered {status} ({cause}): {detail}"
    if status == OVERLOADED:
        return RewardOverloaded(exchange.name, cause, message, _retry_after(headers))
    if cause in INVALID_ANSWERS:
        return RewardInvalid(exchange.name, cause, message)
    if status >= SERVER_ERRORS:
        # A scorer that raised may have been out of luck (memory, a batch mate): worth another try.
        return RewardUnavailable(exchange.name, cause, message)
    return RewardRejected(exchange.name, cause, message)


def _error_body(content: bytes) -> tuple[str, str]:
    try:
        body = json.loads(content)
        return str(body["error"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        return "", content[:200].decode(errors="replace")


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
