"""Answers of the front, as the bytes that follow the status line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

JSON_TYPE = "application/json"
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
CONTINUE = STATUS_LINES[100] + b"\r\n"
CLOSE = b"connection: close\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, its header lines (each with its line end; length and date are added) and its body."""

    status: int
    fields: bytes
    body: bytes


def answer(status: int, media_type: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    lines = {"content-type": media_type, **(headers or {})}
    return Answer(status, "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1"), body)


def json_answer(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
    return answer(status, JSON_TYPE, json.dumps(body).encode(), headers)


def error_answer(status: int, cause: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """The JSON body that every failure has (`common.rewards.api`)."""
    return json_answer(status, {"error": cause, "message": message}, headers)


def head(given: Answer, *, close: bool) -> bytes:
    """Everything before the body: status line, date, header lines."""
    lines = (
        STATUS_LINES[given.status],
        _date(int(time.time())),
        given.fields,
        b"content-length: %d\r\n" % len(given.body),
        CLOSE if close else b"",
        b"\r\n",
    )
    return b"".join(lines)


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    return f"date: {formatdate(second, usegmt=True)}\r\n".encode()


FAILED = error_answer(500, "scorer", "the server failed: its log says why")
"""The answer to a request that raised what nobody expects."""
