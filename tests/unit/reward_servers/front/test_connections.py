"""Who gets a place among the connections, and who is closed for it."""

from __future__ import annotations

import asyncio

from reward_servers.front.connections import ConnectionLimits, Connections
from tests.helpers.counting_service import CountingService
from tests.helpers.raw_http import connected, request
from tests.helpers.serving_app import listening

TIMEOUT = 20.0
GET = request("/page", method="GET")


class Member:
    def __init__(self) -> None:
        self.busy = False
        self.works = False
        self.aborted = False
        self.swept: list[tuple[float, float]] = []

    def abort(self) -> None:
        self.aborted = True

    def drain(self) -> None: ...

    def sweep(self, now: float, late: float) -> None:
        self.swept.append((now, late))


def entered(table: Connections, count: int) -> list[Member]:
    members = [Member() for _ in range(count)]
    for member in members:
        table.enter(member)
    return members


def test_the_stranger_that_was_silent_longest_makes_room_and_never_the_newcomer() -> None:
    table = Connections(ConnectionLimits(most=3))
    first, second, third = entered(table, 3)
    table.active(first)
    table.trust(third)
    (newcomer,) = entered(table, 1)
    assert [one.aborted for one in (first, second, third, newcomer)] == [False, True, False, False]
    entered(table, 1)
    assert [one.aborted for one in (first, newcomer)] == [True, False]
    assert len(table) == 3


def test_without_another_stranger_the_idlest_known_connection_makes_room() -> None:
    table = Connections(ConnectionLimits(most=3))
    known = entered(table, 3)
    for member in known:
        table.trust(member)
    table.active(known[0])
    known[1].busy = True
    (newcomer,) = entered(table, 1)
    assert [one.aborted for one in (*known, newcomer)] == [False, False, True, False]


def test_without_an_idle_connection_the_one_that_sends_slowest_makes_room() -> None:
    table = Connections(ConnectionLimits(most=3))
    known = entered(table, 3)
    for member in known:
        table.trust(member)
        member.busy = True
    known[0].works = True
    table.active(known[1])
    (newcomer,) = entered(table, 1)
    assert [one.aborted for one in (*known, newcomer)] == [False, False, True, False]


def test_a_newcomer_waits_while_every_connection_works() -> None:
    async def run() -> None:
        table = Connections(ConnectionLimits(most=2))
        known = entered(table, 2)
        for member in known:
            table.trust(member)
            member.busy = member.works = True
        waiting = asyncio.create_task(table.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        known[0].busy = known[0].works = False
        table.at_rest()
        async with asyncio.timeout(TIMEOUT):
            await waiting

    asyncio.run(run())


def test_time_in_which_the_process_stood_still_counts_for_nobody() -> None:
    async def run() -> None:
        table = Connections(ConnectionLimits(sweep_s=0.01))
        (member,) = entered(table, 1)
        sweeping = asyncio.create_task(table.sweep())
        async with asyncio.timeout(TIMEOUT):
            while not member.swept:
                await asyncio.sleep(0)
            until = asyncio.get_running_loop().time() + 0.2
            while asyncio.get_running_loop().time() < until:  # the event loop is blocked
                pass
            seen = len(member.swept)
            while len(member.swept) == seen:
                await asyncio.sleep(0)
        sweeping.cancel()
        assert member.swept[seen][1] >= 0.15

    asyncio.run(run())


def test_a_flood_of_silent_strangers_closes_strangers_alone() -> None:
    """Over sockets: 60 strangers on 16 places, half of which answered a page; two known clients stay."""
    limits = ConnectionLimits(most=16)

    async def run() -> None:
        service = CountingService()
        async with (
            asyncio.timeout(TIMEOUT),
            listening(service, limits) as port,
            connected(port) as idle,
            connected(port) as working,
        ):
            assert (await idle.ask(request("/trusted"))).status == 200
            await working.send(request("/trusted/never"))
            flood = []
            for index in range(60):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                if index % 2:
                    writer.write(GET)
                    await reader.readuntil(b"page")
                flood.append((reader, writer))
            async with connected(port) as newcomer:
                assert (await newcomer.ask(GET)).body == b"page"
            assert (await idle.ask(request("/trusted"))).status == 200
            assert service.taken[1].status == 0
            for _, writer in flood:
                writer.close()

    asyncio.run(run())
