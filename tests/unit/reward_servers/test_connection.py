"""Limits of size and time for a connection that has not sent a token yet. Over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from reward_servers import connection
from reward_servers.connection import MAX_HEAD_BYTES, BoundedConnection

TIMEOUT = 10.0
ANSWERED = b"HTTP/1.1 200 OK"


async def app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Answers with the number of its body's bytes; /early answers before it has read any."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    content = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
    await send({"type": "http.response.body", "body": content})


def drive(scenario: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
    async def run() -> None:
        config = uvicorn.Config(app, http=BoundedConnection, log_level="critical", lifespan="off")
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: BoundedConnection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with asyncio.timeout(TIMEOUT), server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                await scenario(reader, writer)
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    asyncio.run(run())


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    received = b""
    try:
        while piece := await reader.read(2**16):
            received += piece
    except ConnectionError:  # closed with bytes of ours unread
        pass
    return received


@pytest.mark.parametrize(
    ("start", "filling"),
    [
        (b"GET / HTTP/1.1\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\nx: ", b"y" * 1000),
        (b"GET /", b"y" * 1000),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", b"y" * 1000),
    ],
    ids=["headers", "a header", "a path", "trailers", "a trailer"],
)
def test_a_head_or_trailers_without_end_are_cut_off(start: bytes, filling: bytes) -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def pour() -> None:
            writer.write(start)
            try:
                while True:
                    writer.write(filling)
                    await writer.drain()
            except ConnectionError:
                pass

        pouring = asyncio.create_task(pour())
        assert ANSWERED not in await until_closed(reader)
        pouring.cancel()

    drive(scenario)


def test_a_head_of_the_limit_and_a_long_body_are_read() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 4 * MAX_HEAD_BYTES
        for _ in range(2):  # a connection is used again
            writer.write(b"POST / HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_BYTES - 100) + b"\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % size + bytes(size))
            await writer.drain()
            answer = await reader.readuntil(b"%d" % size)
            assert answer.startswith(ANSWERED)

    drive(scenario)


@pytest.mark.parametrize(
    ("whole", "begun"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"", b"GET / HTTP/1.1\r\nhost: x\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"GET"),
        (b"POST /early HTTP/1.1\r\ncontent-length: 9\r\n\r\n", b"half"),
    ],
    ids=["nothing", "an empty line", "half a head", "an empty line after", "another half", "half a body"],
)
def test_who_does_not_go_on_is_left(whole: bytes, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole)
        if whole:
            await reader.readuntil(b"\r\n\r\n0")
        writer.write(begun)
        assert await until_closed(reader) == b""
        closed.append(True)

    closed: list[bool] = []
    drive(scenario)
    assert closed == [True]


def test_a_slow_body_and_a_slow_answer_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time is the request's own deadline; the head's is over when the head is."""
    timers: list[float] = []

    class Counted(BoundedConnection):
        def _start_timer(self) -> None:
            super()._start_timer()
            timers.append(1)

        def _stop_timer(self) -> None:
            super()._stop_timer()
            timers.append(-1)

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            assert self._timer is None

    monkeypatch.setitem(globals(), "BoundedConnection", Counted)

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\na")
        await writer.drain()
        writer.write(b"b")
        assert (await reader.readuntil(b"\r\n\r\n2")).startswith(ANSWERED)

    drive(scenario)
    assert timers
