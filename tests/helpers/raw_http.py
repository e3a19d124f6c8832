"""HTTP byte by byte, for what no client library would send."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

READ_BYTES = 2**16
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")


@dataclass(frozen=True)
class Answered:
    """One answer as it came."""

    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def closes(self) -> bool:
        return b"connection: close" in self.head


def request(
    path: str = "/v1/score",
    body: bytes = b"",
    fields: Sequence[str] = (),
    method: str = "POST",
    length: int | str | None = None,
    host: bool = True,
) -> bytes:
    """A request; `length` is the declared one, by default the true one, and "" leaves it out."""
    lines = [f"{method} {path} HTTP/1.1", *(["host: x"] if host else []), *fields]
    if length != "":
        lines.append(f"content-length: {len(body) if length is None else length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *data: bytes) -> None:
        for piece in data:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self) -> Answered:
        """The next answer; IncompleteReadError if the connection ends before it does."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        return Answered(head, await self.reader.readexactly(int(length[1])) if length else b"")

    async def ask(self, *data: bytes) -> Answered:
        await self.send(*data)
        return await self.answer()

    async def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        received = b""
        with suppress(ConnectionError):  # closed while bytes of ours were unread
            while piece := await self.reader.read(READ_BYTES):
                received += piece
        return received


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
