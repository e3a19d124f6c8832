"""The front's connection over real sockets: limits before a token, order of answers, ends of every kind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from reward_servers.front.answers import answer
from reward_servers.front.connections import ConnectionLimits
from reward_servers.front.faults import MAX_PIPELINED
from tests.helpers.counting_service import CountingService
from tests.helpers.raw_http import RawClient, connected, request
from tests.helpers.serving_app import listening

TIMEOUT = 20.0
LIMITS = ConnectionLimits(sweep_s=0.01)
SHORT = replace(LIMITS, head_s=0.05, stranger_s=0.05, linger_s=0.05)
LATE = answer(200, "text/plain", b"late")
GET = request("/a", method="GET")

Scenario = Callable[[RawClient, CountingService], Awaitable[None]]


def drive(scenario: Scenario, limits: ConnectionLimits = LIMITS) -> CountingService:
    service = CountingService()

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT), listening(service, limits) as port, connected(port) as client:
            await scenario(client, service)

    asyncio.run(run())
    return service


@pytest.mark.parametrize(
    ("start", "filling"),
    [
        (b"GET / HTTP/1.1\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\nx: ", b"y" * 1000),
        (b"GET /", b"y" * 1000),
        (request(length="", fields=["transfer-encoding: chunked"]) + b"0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (request(length="", fields=["transfer-encoding: chunked"]) + b"0\r\nx: ", b"y" * 1000),
        (request(length="", fields=["transfer-encoding: chunked"]) + b"1;", b"y" * 1000),
    ],
    ids=["headers", "a header", "a path", "trailers", "a trailer", "a chunk's extension"],
)
def test_what_never_becomes_a_request_is_cut_off(start: bytes, filling: bytes) -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        async def pour() -> None:
            client.writer.write(start)
            while True:
                await client.send(filling)

        pouring = asyncio.create_task(pour())
        assert b"200 OK" not in await client.rest()
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)

    drive(scenario, SHORT)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (b"GET / HTTP/1.1\r\nx: ", b""),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: ", b"\r\n\r\n"),
        (b"GET /", b" HTTP/1.1\r\n\r\n"),
    ],
    ids=["it goes on", "whole in one read", "its target"],
)
def test_a_head_that_is_too_long_is_told_so(start: bytes, end: bytes) -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        answered = await client.ask(start + b"y" * (LIMITS.head_bytes + 1) + end)
        assert (answered.status, answered.json["error"], answered.closes) == (431, "too_large", True)

    drive(scenario)


def test_empty_header_lines_count_as_what_they_take() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        lines = b"a:\r\n" * (LIMITS.head_bytes // 4)
        answered = await client.ask(b"GET /a HTTP/1.1\r\nhost: here\r\n" + lines + b"\r\n")
        assert (answered.status, answered.closes) == (431, True)

    drive(scenario)


@pytest.mark.parametrize("size", [2**16, 2**17 + 1, 2**20])
def test_a_long_body_is_read_to_its_last_byte_and_no_further(size: int) -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        content = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
        await client.send(request("/a", content) + GET + request("/early", content) + request("/b", content) + GET)
        assert [(await client.answer()).body for _ in range(5)] == [b"%d" % size, b"0", b"later", b"%d" % size, b"0"]
        assert [bytes(one.content) for one in service.taken] == [content, b"", content, b""]

    drive(scenario)


def test_a_head_of_the_limit_and_a_long_body_are_read() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        size = 4 * LIMITS.head_bytes
        for _ in range(2):  # a connection is used again
            long = f"x: {'y' * (LIMITS.head_bytes - 200)}"
            answered = await client.ask(request(body=bytes(size), fields=[long]))
            assert (answered.status, answered.body, answered.closes) == (200, b"%d" % size, False)

    drive(scenario)


@pytest.mark.parametrize(
    ("whole", "begun"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"", b"GET / HTTP/1.1\r\nhost: x\r\n"),
        (GET, b"\r\n"),
        (GET, b"GET"),
        (request("/early", length=9), b"half"),
    ],
    ids=["nothing", "an empty line", "half a head", "an empty line after", "another half", "half a refused body"],
)
def test_who_does_not_go_on_is_closed(whole: bytes, begun: bytes) -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        if whole:
            await client.ask(whole)
        await client.send(begun)
        assert await client.rest() == b""

    drive(scenario, SHORT)


def test_a_head_that_drips_is_cut_off_as_if_it_stood_still() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        async def drip() -> None:
            await client.send(b"GET /")
            while True:
                await client.send(b"a")
                await asyncio.sleep(0.005)

        dripping = asyncio.create_task(drip())
        assert await client.rest() == b""
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)

    drive(scenario, SHORT)


def test_who_showed_a_token_may_be_idle_for_longer() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        await client.ask(request("/trusted"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.rest(), 5 * SHORT.stranger_s)
        assert (await client.ask(GET)).status == 200

    drive(scenario, SHORT)


def test_a_body_slower_than_the_least_rate_is_refused_and_one_as_fast_is_not() -> None:
    limits = replace(LIMITS, window_s=0.2, window_bytes=4)

    async def scenario(client: RawClient, service: CountingService) -> None:
        await client.send(request(length=100))
        for _ in range(10):  # half a second: more than two windows
            await client.send(b"12345")
            await asyncio.sleep(0.05)
        assert service.taken[0].status == 0
        answered = await client.answer()
        assert (answered.status, answered.json["error"], answered.closes) == (408, "request", True)
        assert service.taken[0].status == 408
        assert await client.rest() == b""

    drive(scenario, limits)


def test_a_model_that_takes_long_is_waited_for() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        await client.send(request("/never") + b"GET /half a head of the next one")
        await asyncio.sleep(5 * SHORT.head_s)
        service.taken[0].exchange.finish(LATE)
        assert (await client.answer()).body == b"late"

    drive(scenario, replace(SHORT, window_s=0.05))


def test_answers_leave_in_the_order_of_their_requests_and_one_is_computed_at_a_time() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        await client.send(request("/never", b"ab") + request("/early") + request("/b", b"abc") + request("/page"))
        while len(service.taken) < 3:
            await asyncio.sleep(0)
        never, counted, page = service.taken
        assert (never.calls, counted.calls, page.calls) == (["start", "complete"], [], [])
        never.exchange.finish(LATE)
        bodies = [(await client.answer()).body for _ in range(4)]
        assert bodies == [b"late", b"later", b"3", b"page"]
        assert counted.calls == ["start", "complete", "sent"]

    drive(scenario)


def test_too_many_requests_ahead_of_their_answers_end_the_connection() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        await client.send(request("/never") + GET * 3000)
        while not service.taken:
            await asyncio.sleep(0)
        service.taken[0].exchange.finish(LATE)
        statuses = [(await client.answer()).status for _ in range(MAX_PIPELINED + 1)]
        assert statuses == [200] * MAX_PIPELINED + [429]
        assert await client.rest() == b""
        assert len(service.taken) == MAX_PIPELINED

    drive(scenario, SHORT)


def test_a_hang_up_is_seen_at_once_and_drops_what_waits() -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        await client.send(request("/never") + request("/b"))
        while len(service.taken) < 2:
            await asyncio.sleep(0)
        client.writer.close()
        while not all(one.status for one in service.taken):
            await asyncio.sleep(0)
        assert [one.status for one in service.taken] == [499, 499]
        assert [one.calls[-1] for one in service.taken] == ["sent", "sent"]
        service.taken[0].exchange.finish(LATE)  # ignored

    drive(scenario)


def test_a_client_that_closes_its_side_gets_a_page_but_no_score() -> None:
    async def page(client: RawClient, service: CountingService) -> None:
        client.writer.write(request("/page") + request("/page"))
        client.writer.write_eof()
        assert (await client.rest()).count(b"200 OK") == 2

    async def score(client: RawClient, service: CountingService) -> None:
        client.writer.write(request("/never"))
        client.writer.write_eof()
        assert await client.rest() == b""
        assert service.taken[0].status == 499

    drive(page)
    drive(score)


def test_an_answer_that_is_not_read_ends_the_connection_and_is_held_until_then() -> None:
    limits = replace(LIMITS, window_s=0.1, window_bytes=2**20)

    async def scenario(client: RawClient, service: CountingService) -> None:
        client.writer.transport.pause_reading()
        await client.send(request("/never"))
        while not service.taken:
            await asyncio.sleep(0)
        counter = service.taken[0]
        counter.exchange.finish(answer(200, "text/plain", bytes(2**25)))
        assert counter.calls == ["start", "complete"]
        while counter.calls[-1] != "sent":
            await asyncio.sleep(0.01)
        assert counter.status == 0

    drive(scenario, limits)


def test_a_failure_of_the_front_is_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: RawClient, service: CountingService) -> None:
        with caplog.at_level(logging.ERROR):
            answered = await client.ask(request("/raise"))
        assert (answered.status, answered.json["error"], service.taken[0].status) == (500, "scorer", 500)
        assert (await client.ask(GET)).status == 200
        assert "asked to fail" in caplog.text

    drive(scenario)
