"""Mutated bodies and header sequences through the front, with real batchers behind it and no socket before it.

Each stream must end: with answers that are HTTP and no failure of the server, a connection that is at rest, and nothing
left in a queue or a budget.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter
from http.client import HTTPResponse
from pathlib import Path

import pytest

from reward_servers.app import ServerApp
from reward_servers.front.answers import CONTINUE
from reward_servers.front.connection import Connection
from reward_servers.front.connections import ConnectionLimits, Connections
from tests.helpers.hostile_bodies import SCORE
from tests.helpers.hostile_streams import Stream, hostile_streams
from tests.helpers.memory_transport import MemoryTransport
from tests.helpers.raw_http import request
from tests.helpers.serving_app import service_of
from tests.helpers.toy_scorers import BrightnessScorer

PER_SEED = 5_000
SEEDS = (0, *(pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]) for seed in range(1, 21)))
WARM_UP = 500
STREAM_SECONDS = 30.0
EXPECTED = {200, 400, 401, 404, 405, 408, 413, 415, 422, 429, 431, 504}


class Sent(io.BytesIO):
    """Answers as `http.client` reads them."""

    def makefile(self, mode: str) -> io.BytesIO:
        return self

    def close(self) -> None:
        """`http.client` closes it after each answer."""


def answers(written: bytes) -> list[tuple[int, bytes, str]]:
    """Status, body and type of each answer. Leave to send a body that never came whole is followed by none."""
    written = written.removesuffix(CONTINUE)
    sent, found = Sent(written), []
    while sent.tell() < len(written):
        response = HTTPResponse(sent)
        response.begin()
        found.append((response.status, response.read(), response.headers.get("content-type", "")))
    return found


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


async def send(service: ServerApp, table: Connections, stream: Stream) -> bytes:
    connection = Connection(service, table)
    transport = MemoryTransport(connection)
    until = time.monotonic() + STREAM_SECONDS
    for piece in stream.pieces:
        if not transport.ended:
            connection.data_received(piece)
    if not stream.leaves:
        while connection._queue and connection._queue[0].complete:
            assert time.monotonic() < until, stream
            await asyncio.sleep(0)
    if not transport.ended and not connection.eof_received():
        transport.close()
    while connection in table.each():
        assert time.monotonic() < until, stream
        await asyncio.sleep(0)
    assert not connection.busy
    return bytes(transport.written)


def at_rest(service: ServerApp) -> bool:
    """Whether nothing waits and nothing is held."""
    exposed = service._metrics.exposition().decode()
    return all(f'reward_server_queue_{what}{{scorer="brightness"}} 0.0' in exposed for what in ("images", "bytes"))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_stream_is_answered_or_ended(seed: int) -> None:
    statuses: Counter[int] = Counter()

    async def run() -> None:
        before = 0
        table = Connections(ConnectionLimits())
        async with service_of({"brightness": BrightnessScorer()}) as service:
            for index, stream in enumerate(hostile_streams(PER_SEED, seed)):
                written = await send(service, table, stream)
                if b"HEAD" not in b"".join(stream.pieces):
                    for status, body, media in answers(written):
                        statuses[status] += 1
                        assert status in EXPECTED, (stream, status, body)
                        if status >= 400:
                            assert json.loads(body)["message"], (stream, body)
                        assert media
                if index == WARM_UP:
                    before = resident_kib()
            assert resident_kib() <= 2 * before
            (status, _, _), *rest = answers(await send(service, table, Stream((request(body=SCORE),), leaves=False)))
            assert (status, rest, len(table)) == (200, [], 0)
            # A reader thread may still end the work of a client that is gone.
            async with asyncio.timeout(STREAM_SECONDS):
                while not at_rest(service):
                    await asyncio.sleep(0.01)

    asyncio.run(run())
    assert statuses.total() > PER_SEED / 2
    assert {200, 400, 404, 415, 422} <= set(statuses)
