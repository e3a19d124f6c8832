"""Runs an ASGI application for requests that need no scorer: their bodies are not read, their answers are small."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from reward_servers.front.answers import FAILED, Answer
from reward_servers.front.exchange import Consumer, Exchange

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

TRUST = "rtdmd.trust"
"""Entry of the scope: a page calls it once the request has shown that it may use a scorer."""
logger = logging.getLogger(__name__)


class Page(Consumer):
    """One request to the application."""

    waits_for_body = False

    def __init__(self, application: Application, exchange: Exchange, path: bytes) -> None:
        self._application = application
        self._exchange = exchange
        self._path = path
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def dropped(self, status: int) -> None:  # noqa: ARG002
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        status, fields, body = 500, b"", bytearray()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, fields
            if message["type"] == "http.response.start":
                status = message["status"]
                lines = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                fields = b"".join(b"%b: %b\r\n" % line for line in lines)
            else:
                body.extend(message.get("body", b""))

        try:
            await self._application(self._scope(), receive, send)
        except Exception:  # anything a page raises must not end the server
            logger.exception("the page %s failed", self._path.decode(errors="replace"))
            self._exchange.finish(FAILED)
        else:
            self._exchange.finish(Answer(status, fields, bytes(body)))

    def _scope(self) -> Message:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self._exchange.method.decode("ascii"),
            "scheme": "http",
            "path": self._path.decode(errors="replace"),
            "root_path": "",
            "query_string": self._exchange.target.partition(b"?")[2],
            "headers": list(self._exchange.fields.items()),
            TRUST: self._exchange.trust,
        }
