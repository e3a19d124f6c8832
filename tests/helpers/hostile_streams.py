"""Streams of bytes made to hurt an HTTP front: valid requests, mutated and put together, in pieces. All from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.helpers.hostile_bodies import GRADIENT, SCORE, hostile_bodies
from tests.helpers.raw_http import request

TOKENS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\r\n\r\n", b"0\r\n\r\n", b"\xff", b"%00", b"%2f", b"//", b"?"),
    *(b"content-length: 5\r\n", b"content-length: 0\r\n", b"content-length: 18446744073709551615\r\n"),
    *(b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip\r\n", b"transfer-encoding: identity\r\n"),
    *(b"expect: 100-continue\r\n", b"connection: close\r\n", b"connection: keep-alive\r\n", b"host: y\r\n"),
    *(b"connection: upgrade\r\nupgrade: h2c\r\n", b"x-deadline-seconds: nan\r\n", b"content-encoding: gzip\r\n"),
    *(b"x-deadline-seconds: 1e-9\r\n", b"authorization: Bearer \xc3\xa9\r\n", b" folded\r\n", b"HTTP/1.0", b"HTTP/2.0"),
    *(
        b"GET ",
        b"POST ",
        b"HEAD ",
        b"CONNECT ",
        b"OPTIONS * ",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"ffffffffffffffff\r\n",
    ),
)
CHUNKED = ["transfer-encoding: chunked"]


@dataclass(frozen=True)
class Stream:
    """What one client sends, in the pieces in which it arrives; `leaves` closes the connection at once after them."""

    pieces: tuple[bytes, ...]
    leaves: bool


def hostile_streams(count: int, seed: int) -> Iterator[Stream]:
    draw = random.Random(seed)
    bodies = [body for body in hostile_bodies(200, seed, large=2**12) if len(body.body) < 2**14]
    for _ in range(count):
        chosen = draw.choice(bodies)
        seeds = [*SEEDS, request(chosen.path, chosen.body)]
        data = b"".join(draw.choice(seeds) for _ in range(draw.choice((1, 1, 1, 2, 3, 8))))
        for _ in range(draw.choice((0, 1, 1, 2, 4, 16))):
            data = draw.choice(MUTATIONS)(draw, data)
        yield Stream(tuple(_cut(draw, data)), draw.random() < 0.2)


def _chunks(body: bytes, size: int) -> bytes:
    cut = [body[index : index + size] for index in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut) + b"0\r\n\r\n"


SEEDS = (
    request("/v1/score", SCORE),
    request("/v1/gradient", GRADIENT),
    request("/v1/score", _chunks(SCORE, 50), CHUNKED, length=""),
    request("/v1/score", SCORE, ["expect: 100-continue"]),
    request("/v1/score", SCORE, ["connection: close"]),
    request("/score", b'{"image_base64": "", "prompt": "a"}'),
    request("/healthz", method="GET", length=""),
    request("/v1/info", method="HEAD", length=""),
    request("/nothing", b"abc"),
)


def _flip(draw: random.Random, data: bytes) -> bytes:
    place = draw.randrange(max(1, len(data)))
    return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]


def _insert(draw: random.Random, data: bytes) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(TOKENS) + data[place:]


def _insert_line(draw: random.Random, data: bytes) -> bytes:
    """At the end of a line, where header lines are read."""
    places = [index for index in range(min(len(data), 400)) if data[index : index + 2] == b"\r\n"] or [0]
    place = draw.choice(places) + 2
    return data[:place] + draw.choice(TOKENS) + data[place:]


def _remove(draw: random.Random, data: bytes) -> bytes:
    begin = draw.randrange(len(data) + 1)
    return data[:begin] + data[begin + draw.choice((1, 2, 10, 100)) :]


def _repeat(draw: random.Random, data: bytes) -> bytes:
    begin = draw.randrange(len(data) + 1)
    end = begin + draw.choice((1, 10, 100))
    return data[:end] + data[begin:end] * draw.choice((1, 2, 100)) + data[end:]


def _shorten(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _digit(draw: random.Random, data: bytes) -> bytes:
    """Another digit in a length or a chunk's size."""
    places = [index for index, byte in enumerate(data[:600]) if chr(byte).isdigit()] or [0]
    place = draw.choice(places)
    return data[:place] + draw.choice((b"9", b"0", b"a", b"-", b"99999999")) + data[place + 1 :]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flip, _flip, _insert, _insert_line, _insert_line, _remove, _repeat, _shorten, _digit),
)


def _cut(draw: random.Random, data: bytes) -> Iterator[bytes]:
    if draw.random() < 0.5:
        yield data
        return
    while data:
        size = draw.choice((1, 2, 7, 100, 1000))
        yield data[:size]
        data = data[size:]
