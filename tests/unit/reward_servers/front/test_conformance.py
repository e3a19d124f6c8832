"""HTTP/1.1 as RFC 9112 has it: what is ambiguous is refused and ends the connection, what is valid is read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from reward_servers.front.connections import ConnectionLimits
from tests.helpers.counting_service import CountingService
from tests.helpers.raw_http import RawClient, connected, request
from tests.helpers.serving_app import listening

TIMEOUT = 20.0
CHUNKED = "transfer-encoding: chunked"
SMUGGLED = request("/smuggled", method="GET")


def drive(scenario: Callable[[RawClient], Awaitable[None]]) -> CountingService:
    service = CountingService()

    async def run() -> None:
        limits = ConnectionLimits(linger_s=0.05, sweep_s=0.01)
        async with asyncio.timeout(TIMEOUT), listening(service, limits) as port, connected(port) as client:
            await scenario(client)

    asyncio.run(run())
    return service


def head(*lines: str) -> bytes:
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


AMBIGUOUS = {
    "a length beside chunks": request("/a", b"0\r\n\r\n", [CHUNKED]),
    "chunks beside a length": head("POST /a HTTP/1.1", "host: x", "content-length: 3", CHUNKED) + b"0\r\n\r\n",
    "two lengths": request("/a", b"abc", ["content-length: 3"]),
    "two different lengths": request("/a", b"abc", ["content-length: 44"]),
    "a list of lengths": request("/a", b"abc", length="3, 3"),
    "a length that is a word": request("/a", b"abc", length="three"),
    "a length with a sign": request("/a", b"abc", length="+3"),
    "a negative length": request("/a", length="-1"),
    "a length in hexadecimal": request("/a", b"abc", length="0x3"),
    "a length beyond 64 bits": request("/a", length=10**20),
    "an empty length": head("POST /a HTTP/1.1", "host: x", "content-length: "),
    "a folded line": request("/a", fields=["a: b", " c"]),
    "a folded length": head("POST /a HTTP/1.1", "host: x", "content-length:", " 3") + b"abc",
    "a blank before the colon": request("/a", fields=["a : b"]),
    "a name that is empty": request("/a", fields=[": b"]),
    "a null in a value": request("/a", fields=["a: b\0c"]),
    "a bare line feed": b"GET /a HTTP/1.1\nhost: x\n\n",
    "a bare carriage return": b"GET /a HTTP/1.1\rhost: x\r\n\r\n",
    "chunked is not last": request("/a", length="", fields=["transfer-encoding: chunked, identity"]),
    "chunked twice": request("/a", length="", fields=[CHUNKED, CHUNKED]),
    "a chunk of no number": request("/a", b"zz\r\nabc", [CHUNKED], length=""),
    "a chunk beyond 64 bits": request("/a", b"f" * 17 + b"\r\nabc", [CHUNKED], length=""),
    "a negative chunk": request("/a", b"-3\r\nabc\r\n0\r\n\r\n", [CHUNKED], length=""),
    "a chunk that is longer than it says": request("/a", b"3\r\nabcd\r\n0\r\n\r\n", [CHUNKED], length=""),
    "a chunk with a bare line feed": request("/a", b"3\nabc\n0\n\n", [CHUNKED], length=""),
    "no host": request("/a", host=False),
    "two hosts": request("/a", fields=["host: y"]),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 by name": b"GET /a HTTP/2.0\r\nhost: x\r\n\r\n",
    "HTTP/1.9": b"GET /a HTTP/1.9\r\nhost: x\r\n\r\n",
    "HTTP/0.9": b"GET /a\r\n\r\n",
    "TLS": bytes.fromhex("160301020001000001fc0303") + bytes(100),
    "an upgrade with a body": request("/a", b"abc", ["connection: upgrade", "upgrade: h2c"]),
    "no method": b"\0\0\0\0",
}


@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_is_ambiguous_is_refused_and_what_follows_it_is_not_read(data: bytes) -> None:
    async def scenario(client: RawClient) -> None:
        await client.send(data + SMUGGLED)
        answered = await client.answer()
        assert (answered.status, answered.json["error"], answered.closes) == (400, "wire", True)
        assert await client.rest() == b""

    service = drive(scenario)
    assert not any(one.exchange.target == b"/smuggled" for one in service.taken)


VALID = {
    "chunks": (request("/a", b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", [CHUNKED], length=""), b"13"),
    "chunks with extensions and trailers": (
        request("/a", b"3;x=y\r\nabc\r\n0\r\na: b\r\n\r\n", ["transfer-encoding: Chunked"], length=""),
        b"3",
    ),
    "no body": (request("/a", length=""), b"0"),
    "leading empty lines": (b"\r\n\r\n" + request("/a", b"ab"), b"2"),
    "a length with zeros": (request("/a", b"abc", length="0003"), b"3"),
    "a header without a value": (request("/a", b"abc", ["a:"]), b"3"),
    "a name of any case": (request("/a", b"abc", length="").replace(b"host", b"HOST"), b"0"),
    "an absolute target": (request("http://x/a?b=/early", b"abc"), b"3"),
    "an encoded target": (request("/%61", b"abc"), b"3"),
    "a query": (request("/a?b#c", b"abc"), b"3"),
}


@pytest.mark.parametrize(("data", "body"), VALID.values(), ids=VALID)
def test_what_is_valid_is_read_and_the_connection_goes_on(data: bytes, body: bytes) -> None:
    if data.startswith(b"POST") and b"content-length" not in data and b"chunked" not in data.lower():
        data = data.removesuffix(b"abc")

    async def scenario(client: RawClient) -> None:
        for _ in range(2):
            await client.send(*(data[index : index + 1] for index in range(len(data))))
            answered = await client.answer()
            assert (answered.status, answered.body, answered.closes) == (200, body, False)
        assert b"\r\ndate: " in answered.head

    drive(scenario)


@pytest.mark.parametrize(
    "data",
    [
        request("/a", fields=["connection: close"]),
        b"POST /a HTTP/1.0\r\n\r\n",
        b"POST /a HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
        request("/a", length="", fields=["connection: upgrade", "upgrade: websocket"], method="GET"),
    ],
    ids=["connection: close", "HTTP/1.0", "HTTP/1.0 that would go on", "an upgrade"],
)
def test_the_last_request_of_a_connection_is_answered_and_ends_it(data: bytes) -> None:
    async def scenario(client: RawClient) -> None:
        await client.send(data + SMUGGLED)
        answered = await client.answer()
        assert (answered.status, answered.closes) == (200, True)
        assert await client.rest() == b""

    assert len(drive(scenario).taken) == 1


def test_who_asks_whether_to_send_a_body_is_told() -> None:
    expects = ["expect: 100-Continue"]

    async def goes_on(client: RawClient) -> None:
        answered = await client.ask(request("/a", length=3, fields=expects))
        assert answered.status == 100
        assert (await client.ask(b"abc")).body == b"3"

    async def refused(client: RawClient) -> None:
        """What follows could be its body or a request: the connection ends."""
        answered = await client.ask(request("/early", length=3, fields=expects))
        assert (answered.status, answered.closes) == (429, True)
        assert await client.rest() == b""

    async def in_order(client: RawClient) -> None:
        await client.send(request("/a") + request("/a", length=3, fields=expects))
        assert [(await client.answer()).status for _ in range(2)] == [200, 100]
        assert (await client.ask(b"abc")).body == b"3"

    async def sent_at_once(client: RawClient) -> None:
        assert (await client.ask(request("/a", b"abc", fields=expects))).status in (100, 200)

    for scenario in (goes_on, refused, in_order, sent_at_once):
        drive(scenario)


def test_an_answer_to_head_has_a_length_and_no_body() -> None:
    async def scenario(client: RawClient) -> None:
        await client.send(request("/page", method="HEAD") + request("/a"))
        head_ = await client.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 4\r\n" in head_
        assert (await client.answer()).body == b"0"

    drive(scenario)


def test_a_flood_of_header_lines_is_dropped_or_refused() -> None:
    async def scenario(client: RawClient) -> None:
        few = [f"x-{index}: {index}" for index in range(4000)]
        assert (await client.ask(request("/a", fields=few))).status == 200
        many = [f"x-{index}: {index}" for index in range(40_000)]
        await client.send(request("/a", fields=many))
        assert (await client.answer()).status == 431

    service = drive(scenario)
    assert service.taken[0].exchange.fields.keys() == {b"content-length"}


def test_the_first_of_a_repeated_header_counts() -> None:
    async def scenario(client: RawClient) -> None:
        await client.ask(request("/a", fields=["authorization: Bearer a", "Authorization: Bearer b"]))

    assert drive(scenario).taken[0].exchange.fields[b"authorization"] == b"Bearer a"
