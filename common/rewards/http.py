"""One HTTP request to a reward server. Every failure is a RewardError that names the reward.

caller's thread ──► event loop of the client, one thread ──► pooled connections
                      one deadline covers everything from connecting to the last byte; it closes the connection;
                      an unusually slow request is counted, and its server's identity is requested: is it alive?
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import httpx

from common.errors import (
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
    WireError,
)
from common.rewards.api import CAUSES, DEADLINE_HEADER, INFO_PATH, MEDIA_TYPE, REQUEST_CAUSES, RUN_HEADER
from common.rewards.bearer import REWARD_TOKEN, bearer_token
from common.rewards.proxies import UNUSABLE_ENVIRONMENT, trusts_environment, unreachable, unusable_environment
from common.urls import host_of, uses_proxies, without_secrets
from common.wire import DEFAULT_MAX_BYTES

KEEP_ALIVE_SECONDS = 30.0
"""Idle connections are closed earlier than the servers close them, so that none closes just as it is used."""
IDENTITY_TIMEOUT_S = 2.0
"""A server answers an identity request without its model; one that takes longer than this counts as gone."""
DEADLINE_SHARE = 0.95
"""Fraction of our deadline that is sent to the server, so that it times out before we do."""
CLOSE_TIMEOUT_S = 5.0
MAX_PAGE_BYTES, SHOWN_CHARACTERS = 4_000, 200
"""At most so much of another program's answer is read and shown."""
OVERLOADED = 429
SERVER_ERRORS = 500
REJECTIONS = (400, 413, 415, 422)
INVALID_ANSWERS = ("nan", "count", "shape", "dtype")
"""The server rejected its own scorer's output with one of these causes; the same images would fail again."""
DEFAULT_CAUSE_OF_STATUS = {401: "unauthorized", 404: "not_found", 429: "overloaded"}
REMEDY_OF_CAUSE = {"unauthorized": f": set {REWARD_TOKEN} to the token of this server"}

Answer = TypeVar("Answer")
Received = tuple[int, Mapping[str, str], bytes]
Origin = tuple[str, str, int | None]


class Watcher(Protocol):
    """Receives a notice when a request takes unusually long."""

    patience_s: float

    def overdue(self) -> None: ...


@dataclass(frozen=True)
class Exchange:
    """A request's target: the reward, the base URL of its server, and the seconds it may take."""

    name: str
    url: str
    timeout_s: float
    watcher: Watcher | None = None

    @property
    def where(self) -> str:
        return f"reward {self.name} at {without_secrets(self.url)}"


class RewardHttp:
    """Pooled connections to any number of servers; thread-safe.

    Args:
        token: bearer token for the servers, if they require one.
        urls: base URLs of the servers that may receive the token, beside those that `trust` adds.
        run: name of the run in every request, ASCII. Servers that several runs share serve them in turns.

    Raises:
        ConfigError: no HTTP header can carry the token, or it is too short for a host that is not loopback.
    """

    def __init__(self, token: str | None, urls: Collection[str] = (), run: str | None = None) -> None:
        self._token = bearer_token(token, REWARD_TOKEN, map(host_of, urls))
        self._run = run
        self._trusted: set[Origin] = set()
        self.trust(urls)
        self._clients: dict[bool, httpx.AsyncClient] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-http", daemon=True)
        self._thread.start()

    def trust(self, urls: Collection[str]) -> None:
        """Let the servers at these URLs receive the token, and no other program at another port of their hosts."""
        self._trusted.update(origin for origin in map(_origin, urls) if origin is not None)

    def close(self) -> None:
        """Also end requests in flight; their callers get a RewardError."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()

    def get(self, exchange: Exchange, path: str, read: Callable[[bytes], Answer]) -> Answer:
        return self._answer(exchange, self._supervised(exchange, "GET", path, None), read)

    def post(self, exchange: Exchange, path: str, body: bytes, read: Callable[[bytes], Answer]) -> Answer:
        return self._answer(exchange, self._supervised(exchange, "POST", path, body), read)

    def _answer(
        self, exchange: Exchange, request: Coroutine[Any, Any, Received], read: Callable[[bytes], Answer]
    ) -> Answer:
        try:
            status, headers, content = asyncio.run_coroutine_threadsafe(request, self._loop).result()
            if status != httpx.codes.OK:
                raise _error_of_status(exchange, status, headers, content)
            return _read(exchange, content, read)
        except CancelledError as error:
            raise RewardUnavailable(exchange.name, "disconnected", f"{exchange.where}: the client closed") from error

    async def _supervised(self, exchange: Exchange, method: str, path: str, body: bytes | None) -> Received:
        sending = asyncio.ensure_future(self._send(exchange, method, path, body))
        try:
            async with asyncio.timeout(exchange.timeout_s):
                if exchange.watcher is not None:
                    await self._watch(exchange, exchange.watcher, sending)
                return await sending
        except TimeoutError as error:
            message = f"{exchange.where}: no answer within {exchange.timeout_s:g} s: raise reward_client.timeout_s?"
            raise RewardUnavailable(exchange.name, "timeout", message) from error
        finally:
            # Whatever state the request is in (slow response headers, slow upload), its connection is closed.
            sending.cancel()
            with suppress(asyncio.CancelledError, RewardError):
                await sending

    async def _watch(self, exchange: Exchange, watcher: Watcher, sending: asyncio.Future[Received]) -> None:
        """Return when there is a response; RewardUnavailable when the server is gone."""
        while True:
            await asyncio.wait({sending}, timeout=watcher.patience_s)
            if sending.done():
                return
            watcher.overdue()
            if not await self._is_there(exchange) and not sending.done():
                message = f"{exchange.where}: no answer in {watcher.patience_s:.1f} s, nor to {INFO_PATH}: it hangs"
                raise RewardUnavailable(exchange.name, "hung", message)

    async def _is_there(self, exchange: Exchange) -> bool:
        try:
            async with asyncio.timeout(IDENTITY_TIMEOUT_S):
                await self._send(exchange, "GET", INFO_PATH, None)
        except (TimeoutError, RewardError):
            return False
        return True

    async def _send(self, exchange: Exchange, method: str, path: str, body: bytes | None) -> Received:
        name, content = exchange.name, bytearray()
        try:
            headers = self._headers(exchange, body)
            http = self._client(exchange)
            async with http.stream(method, exchange.url + path, content=body, headers=headers) as response:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > DEFAULT_MAX_BYTES:
                        message = f"{exchange.where}: the answer exceeds {DEFAULT_MAX_BYTES} bytes"
                        raise RewardInvalid(name, "answer", message)
                return response.status_code, response.headers, bytes(content)
        except httpx.ConnectError as error:
            message = f"{exchange.where}: {error}: {unreachable(exchange.url, 'is the server running?')}"
            raise RewardUnavailable(name, "refused", message) from error
        except httpx.ProxyError as error:
            message = f"{exchange.where}: {error}: {unreachable(exchange.url, 'is the proxy right?')}"
            raise RewardUnavailable(name, "disconnected", message) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            message = f"{exchange.where}: the connection broke: {error!r}"
            raise RewardUnavailable(name, "disconnected", message) from error

    def _client(self, exchange: Exchange) -> httpx.AsyncClient:
        """One client for servers that proxies of the environment may lead to, one for those on this machine."""
        proxied = uses_proxies(exchange.url)
        if proxied not in self._clients:
            try:
                self._clients[proxied] = httpx.AsyncClient(
                    headers={"accept-encoding": "identity"},
                    limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS),
                    timeout=None,
                    trust_env=trusts_environment(exchange.url),
                    verify=_tls(proxied),
                )
            except UNUSABLE_ENVIRONMENT as error:
                message = f"{exchange.where}: {unusable_environment(error)}"
                raise RewardUnavailable(exchange.name, "refused", message) from error
        return self._clients[proxied]

    def _headers(self, exchange: Exchange, body: bytes | None) -> dict[str, str]:
        headers = {DEADLINE_HEADER: f"{DEADLINE_SHARE * exchange.timeout_s:g}"}
        if self._run is not None:
            headers[RUN_HEADER] = self._run
        if body is not None:
            headers["content-type"] = MEDIA_TYPE
        if self._token is not None and _origin(exchange.url) in self._trusted:
            headers["authorization"] = f"Bearer {self._token}"
        return headers

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for http in self._clients.values():
            await http.aclose()


@cache
def _tls(from_environment: bool) -> ssl.SSLContext:
    """Created once: loading CA certificates takes longer than many a response. The environment may name its own."""
    return httpx.create_ssl_context(trust_env=from_environment)


def _origin(url: str) -> Origin | None:
    """Scheme, host and port, exactly as httpx uses them: two URL parsers could disagree. None for no URL of httpx."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        return None
    return parsed.scheme, parsed.host.lower(), parsed.port


def _read(exchange: Exchange, content: bytes, read: Callable[[bytes], Answer]) -> Answer:
    try:
        return read(content)
    except WireError as error:
        message = f"{exchange.where}: {error}: is a reward server there? It answered {shown_answer(content)!r}"
        raise RewardInvalid(exchange.name, "wire", message) from error
    except RewardError as error:
        raise RewardInvalid(exchange.name, error.cause, f"{exchange.where}: {error}") from error


def _error_of_status(exchange: Exchange, status: int, headers: Mapping[str, str], content: bytes) -> RewardError:
    """Convert an error status into an error, with the server's cause if it is a known one.

    The request is at fault only if a reward server says so. Anything else, such as another program's page at that
    address or a rejected token, is a failure of this server: another one may answer.
    """
    cause, detail = error_body(content)
    remedy = REMEDY_OF_CAUSE.get(cause, "") if cause else remedy_of_status(status, headers)
    if cause not in CAUSES:
        cause = DEFAULT_CAUSE_OF_STATUS.get(status, "answer")
        remedy = remedy or REMEDY_OF_CAUSE.get(cause, "")
    message = f"{exchange.where} answered {status} ({cause}): {detail}{remedy}"
    if status == OVERLOADED:
        return RewardOverloaded(exchange.name, cause, message, _retry_after(headers))
    if status in REJECTIONS and cause in REQUEST_CAUSES:
        return RewardRejected(exchange.name, cause, message)
    if status >= SERVER_ERRORS and cause in INVALID_ANSWERS:
        return RewardInvalid(exchange.name, cause, message)
    # The scorer may have raised for a passing reason (memory, another request in its batch): retry.
    return RewardUnavailable(exchange.name, cause, message)


def error_body(content: bytes) -> tuple[str, str]:
    """Cause and message of a reward server's error; of another program's answer "" and its beginning."""
    try:
        body = json.loads(content)
        return str(body["error"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        return "", shown_answer(content)


def shown_answer(content: bytes) -> str:
    """The beginning of another program's answer as one line; of a page, such as a proxy's, without its tags."""
    text = content[:MAX_PAGE_BYTES].decode(errors="replace").strip()
    if text.startswith("<"):
        text = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    shown = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())[:SHOWN_CHARACTERS]
    return shown or "an empty answer"


def remedy_of_status(status: int, headers: Mapping[str, str]) -> str:
    """The way out, as the end of a sentence, for statuses that a proxy before the server gives; "" for others."""
    if httpx.codes.is_redirect(status):
        return f": it redirects to {without_secrets(headers.get('location', ''))}: give the server's URL there"
    if status == httpx.codes.PROXY_AUTHENTICATION_REQUIRED:
        return ": HTTP_PROXY and HTTPS_PROXY need the proxy's user and password"
    return ": raise the proxy's limit for a request" if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE else ""


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
