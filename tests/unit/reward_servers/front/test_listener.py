"""The end of a front: who is answered, and who is closed."""

from __future__ import annotations

import asyncio
import socket

from reward_servers.front.answers import answer
from reward_servers.front.connections import ConnectionLimits, Connections
from reward_servers.front.listener import accept, drain
from tests.helpers.counting_service import CountingService
from tests.helpers.raw_http import connected, request

TIMEOUT = 20.0
LATE = answer(200, "text/plain", b"late")


def test_a_drain_answers_what_works_closes_what_is_idle_and_ends_what_is_late() -> None:
    async def run() -> None:
        service, table, hurry = CountingService(), Connections(ConnectionLimits()), asyncio.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            accepting = asyncio.create_task(accept(service, listener, table))
            port = listener.getsockname()[1]
            async with connected(port) as idle, connected(port) as working, connected(port) as late:
                await idle.ask(request("/trusted"))
                await working.send(request("/working/never"), request("/b"))
                await late.send(request("/never"))
                while len(service.taken) < 4:
                    await asyncio.sleep(0)
                accepting.cancel()
                until = asyncio.get_running_loop().time() + TIMEOUT
                draining = asyncio.create_task(drain(table, hurry, until))
                assert await idle.rest() == b""
                by_target = {one.exchange.target: one for one in service.taken}
                by_target[b"/working/never"].exchange.finish(LATE)
                bodies = [(await working.answer()).body for _ in range(2)]
                assert bodies == [b"late", b"0"]
                assert by_target[b"/b"].status == 0
                assert await working.rest() == b""
                assert not draining.done()
                hurry.set()
                assert await late.rest() == b""
                await draining

    async def in_time() -> None:
        async with asyncio.timeout(TIMEOUT):
            await run()

    asyncio.run(in_time())


def test_a_connection_that_was_gone_before_it_was_accepted_is_no_failure() -> None:
    async def run() -> None:
        service, table = CountingService(), Connections(ConnectionLimits())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            for _ in range(40):
                with socket.create_connection(listener.getsockname()) as gone:
                    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            accepting = asyncio.create_task(accept(service, listener, table))
            async with asyncio.timeout(TIMEOUT), connected(listener.getsockname()[1]) as client:
                assert (await client.ask(request("/a"))).status == 200
            accepting.cancel()

    asyncio.run(run())
