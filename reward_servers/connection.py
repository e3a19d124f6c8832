"""HTTP connection that holds few bytes for an unknown client: bounds everything that comes before the token check.

uvicorn's protocol, which parses with llhttp, does not limit the size or the time of a request's head. This class adds
two limits: the bytes that became neither a complete head nor a body (endless heads, endless trailers), and the seconds
for a head, or for the rest of a refused body. uvicorn's own `limit_concurrency` limits the number of connections.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
HEAD_SECONDS = 10.0


class BoundedConnection(HttpToolsProtocol):
    """Closes itself when a client is too slow or sends bytes that never become a request."""

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
        # The parser's callbacks reset it to 0 as soon as the bytes become part of a request.
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
            # The response came before the whole body: its rest is discarded, within a time limit.
            self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
