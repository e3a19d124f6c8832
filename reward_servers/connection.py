"""An HTTP connection that holds little for a stranger: what comes before a token can be asked for is bounded here.

uvicorn's protocol, which parses with llhttp, knows no limit of a head's size or time. Two are enough: of bytes that
became neither a complete head nor a body (heads without end, trailers without end), and of seconds in which a head, or
the rest of a body that was refused, may come. How many connections there may be is uvicorn's own `limit_concurrency`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
HEAD_SECONDS = 10.0


class BoundedConnection(HttpToolsProtocol):
    """Closes itself when a client is too slow, or talks without saying anything."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._expects_head = True
        self._idle_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._expects_head and self._timer is None:
            self._start_timer()
        # The parser's callbacks set it back to 0 as soon as the bytes turn out to be of use.
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request has at most {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._expects_head = False
        self._idle_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._expects_head = True
        self._idle_bytes = 0
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._expects_head:
            # Answered before the body was there: its rest is thrown away, but not for ever.
            self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
