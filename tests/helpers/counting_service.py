"""A service of the front that answers with the number of its body's bytes."""

from __future__ import annotations

from reward_servers.front.answers import Answer, answer
from reward_servers.front.exchange import Consumer, Exchange

REFUSED = answer(429, "text/plain", b"later")


class CountingService:
    """/early answers at the head; /never answers when it is told to; /page needs no body; the rest counts theirs."""

    def __init__(self) -> None:
        self.taken: list[Counter] = []

    def open(self, exchange: Exchange) -> Consumer | Answer:
        if exchange.path == b"/early":
            return REFUSED
        if exchange.path.startswith(b"/trusted"):
            exchange.trust()
        self.taken.append(Counter(exchange))
        return self.taken[-1]


class Counter(Consumer):
    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.waits_for_body = exchange.path != b"/page"
        self.content = bytearray()
        self.status = 0
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")
        if not self.waits_for_body:
            self.exchange.finish(answer(200, "text/plain", b"page"))

    def body(self, piece: bytes) -> None:
        self.content += piece

    def complete(self) -> None:
        self.calls.append("complete")
        if self.exchange.path == b"/raise":
            raise RuntimeError("asked to fail")
        if not self.exchange.path.endswith(b"never"):
            self.exchange.finish(answer(200, "text/plain", b"%d" % len(self.content)))

    def dropped(self, status: int) -> None:
        self.status = status

    def sent(self) -> None:
        self.calls.append("sent")
