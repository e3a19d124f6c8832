"""One request of a connection and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from urllib.parse import unquote_to_bytes

import httptools

from common.rewards.api import DEADLINE_HEADER, RUN_HEADER
from reward_servers.front.answers import Answer

AUTHORIZATION, LENGTH, ENCODING = b"authorization", b"content-length", b"content-encoding"
TRANSFER, EXPECT, DEADLINE = b"transfer-encoding", b"expect", DEADLINE_HEADER.encode()
RUN = RUN_HEADER.encode()
KEPT_FIELDS = frozenset({AUTHORIZATION, LENGTH, ENCODING, TRANSFER, EXPECT, DEADLINE, RUN})
"""Header fields that a server reads; of a repeated one the first counts. All others are dropped as they come."""
CONTINUE_EXPECTED = b"100-continue"
HANG_UP = 499
"""Status that is counted, not sent, when the client is gone before its answer."""


class Consumer:
    """Takes a request whose head was accepted, and calls `Exchange.finish` once."""

    waits_for_body: bool
    """Whether the answer is made from the body; otherwise the body is read and dropped."""

    def start(self) -> None:
        """The requests before this one are answered: begin."""

    def body(self, piece: bytes) -> None:
        """The next bytes of the body. Not called after `finish`."""

    def complete(self) -> None:
        """The whole body came, and the requests before this one are answered."""

    def dropped(self, status: int) -> None:
        """The connection ended this request with `status`, without an answer of this consumer: withdraw the work."""

    def sent(self) -> None:
        """The answer has left the process, or the client is gone: release what it held."""


class Service(Protocol):
    """Decides on a request at its head: an answer at once, or a consumer."""

    def open(self, exchange: Exchange) -> Consumer | Answer: ...


class Exchange:
    """A request from its first byte to the last byte of its answer."""

    __slots__ = (
        *(
            "_flush",
            "_trust",
            "target",
            "method",
            "fields",
            "hosts",
            "head_bytes",
            "body_bytes",
            "keep_alive",
            "head_done",
        ),
        *("consumer", "answer", "started", "complete", "handed"),
    )

    def __init__(self, flush: Callable[[], None], trust: Callable[[], None]) -> None:
        self._flush = flush
        self._trust = trust
        self.target = b""
        self.method = b""
        self.fields: dict[bytes, bytes] = {}
        self.hosts = 0
        self.head_bytes = 0
        self.body_bytes = 0
        self.keep_alive = False
        self.head_done = False
        self.consumer: Consumer | None = None
        self.answer: Answer | None = None
        self.started = False
        """The requests before this one are answered, and the consumer has been told."""
        self.complete = False
        """The whole request has been read."""
        self.handed = False
        """The consumer has been told of it."""

    @property
    def path(self) -> bytes:
        """The path of the target, decoded; b"" for a target that has none."""
        target = self.target
        if not target.startswith(b"/"):
            try:
                target = httptools.parse_url(target).path or b""
            except httptools.HttpParserInvalidURLError:
                return b""
        path = target.partition(b"?")[0].partition(b"#")[0]
        return unquote_to_bytes(path) if b"%" in path else path

    @property
    def expects_continue(self) -> bool:
        return self.fields.get(EXPECT, b"").lower() == CONTINUE_EXPECTED

    def trust(self) -> None:
        """Record that this request may use a scorer: its connection is not the first to be closed any more."""
        self._trust()

    def finish(self, answer: Answer) -> None:
        """Answer. A second call, after a deadline or a hang-up, does nothing."""
        if self.answer is None:
            self.answer = answer
            self._flush()
