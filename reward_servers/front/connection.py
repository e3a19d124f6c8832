"""HTTP/1.1 connection on llhttp: bounds what a client may send, and hands each request to the service at its head.

    head ─► service.open ─► answer at once (the body is read and dropped), or a consumer ─► body ─► complete ─► finish

Answers leave in the order of their requests; a request is computed when those before it are answered. A client that
closes its side while a scorer works for it has hung up: the work is withdrawn. What llhttp refuses as ambiguous (two
lengths, a length beside chunks, folded header lines, bare line feeds) is refused with 400.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import httptools

from reward_servers.front.answers import CONTINUE, FAILED, Answer, error_answer, head
from reward_servers.front.connections import Connections
from reward_servers.front.exchange import HANG_UP, KEPT_FIELDS, LENGTH, TRANSFER, Consumer, Exchange, Service
from reward_servers.front.faults import CROWDED, MAX_PIPELINED, NO_HTTP, fault_of_head, too_long

SEPARATE_BODY = 2**16
"""A longer body is not copied: neither an answer's behind its head, nor a request's by the parser."""
LINE_BYTES = len(b": \r\n")
"""Bytes of a header line besides its name and its value."""
NO_ANSWER = Answer(HANG_UP, b"", b"")
"""Stands where an answer would be, so that a late one is ignored."""
TOO_SLOW = error_answer(408, "request", "the body came at less than 64 KiB per second: send it faster")

logger = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """One client's connection."""

    _transport: asyncio.Transport

    def __init__(self, service: Service, table: Connections) -> None:
        self._service = service
        self._table = table
        self._limits = table.limits
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        # Requests whose answer has not been written, in their order.
        self._queue: deque[Exchange] = deque()
        # The request whose bytes are arriving; its answer may be written already.
        self._reading: Exchange | None = None
        self._held: list[Consumer] = []
        # Bytes of its body that go past the parser, and bytes that became no part of a request yet.
        self._left = 0
        self._stray_bytes = 0
        self._trusted = False
        # No further bytes are parsed; a last answer was written; the client has closed its side.
        self._deaf = False
        self._ending = False
        self._client_closed = False
        self._output_full = False
        # When `sweep` looks at this connection, and the bytes that have moved by then.
        self._due = math.inf
        self._moved = 0

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have no base class.
        self._transport = transport = cast(asyncio.Transport, transport)
        # An answer is written once the kernel has it: a stop waits until then.
        transport.set_write_buffer_limits(high=0)
        self._set_due()
        self._table.enter(self)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._table.active(self)
        if self._left:
            data = self._read_past_parser(data)
            if not data or self._deaf:
                return
        self._stray_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True
        except httptools.HttpParserError as error:
            self._break_off(error_answer(400, "wire", f"{NO_HTTP}: {error}"))
        if self._stray_bytes > self._limits.head_bytes and not self._deaf:
            self._break_off(too_long(self._limits.head_bytes))
        self._left = self._bytes_left()

    def eof_received(self) -> bool:
        """Whether the transport stays open: only for answers that need no scorer."""
        self._deaf = self._client_closed = True
        scorer_works = any(one.consumer is not None and one.consumer.waits_for_body for one in self._queue)
        if not self._queue or scorer_works or self._reading is not None:
            return False
        self._queue[-1].keep_alive = False
        return True

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        self._deaf, self._reading = True, None
        self._table.leave(self)
        self._drop_queue(HANG_UP)
        self._release()

    def pause_writing(self) -> None:
        self._output_full = True
        self._moved = self._transport.get_write_buffer_size()
        self._due = self._loop.time() + self._limits.window_s

    def resume_writing(self) -> None:
        self._output_full = False
        self._release()
        self._set_due()
        self.flush()
        self._table.at_rest()

    # What llhttp calls.

    def on_message_begin(self) -> None:
        if self._deaf or self._ending or (self._queue and not self._queue[-1].keep_alive):
            return
        self._reading = Exchange(self.flush, self._trust)
        self._set_due()

    def on_url(self, url: bytes) -> None:
        if (exchange := self._reading) is not None:
            exchange.target += url
            exchange.head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._reading
        if exchange is None or exchange.head_done:
            return
        exchange.head_bytes += len(name) + len(value) + LINE_BYTES
        name = name.lower()
        if name in KEPT_FIELDS:
            exchange.fields.setdefault(name, value)
        elif name == b"host":
            exchange.hosts += 1

    def on_headers_complete(self) -> None:
        exchange = self._reading
        if exchange is None:
            return
        parser = self._parser
        version = parser.get_http_version()
        exchange.head_done = True
        exchange.method = parser.get_method()
        exchange.keep_alive = version != "1.0" and parser.should_keep_alive() and not parser.should_upgrade()
        self._queue.append(exchange)
        self._stray_bytes = 0
        self._set_due()
        opened = self._fault(exchange, version) or self._open(exchange)
        if isinstance(opened, Answer):
            exchange.answer = opened
            # A client that waits for leave to send its body may send it or not: what follows could not be told apart.
            exchange.keep_alive = exchange.keep_alive and not exchange.expects_continue
        else:
            exchange.consumer = opened
        self.flush()

    def on_body(self, body: bytes) -> None:
        self._stray_bytes = 0
        self._moved += len(body)
        exchange = self._reading
        if exchange is not None:
            exchange.body_bytes += len(body)
        if exchange is None or exchange.answer is not None or (consumer := exchange.consumer) is None:
            return
        consumer.body(body)

    def on_message_complete(self) -> None:
        self._stray_bytes = 0
        exchange = self._reading
        if exchange is None:
            return
        self._reading = None
        exchange.complete = True
        self._set_due()
        self.flush()

    # What requests and the table of connections call.

    @property
    def busy(self) -> bool:
        return bool(self._queue) or self._output_full or (self._reading is not None and self._reading.head_done)

    @property
    def works(self) -> bool:
        return any(exchange.complete for exchange in self._queue)

    def flush(self) -> None:
        """Write the answers that are due, and begin the request after them."""
        while self._queue and not self._output_full and not self._ending:
            exchange = self._queue[0]
            if exchange.answer is None:
                self._run(exchange)
                return
            self._queue.popleft()
            self._write(exchange, exchange.answer)

    def abort(self) -> None:
        self._transport.abort()

    def drain(self) -> None:
        """Take no further request: close now, or after the answers that are due."""
        if self._queue:
            self._queue[-1].keep_alive = False
        elif self._reading is None or not self._reading.head_done:
            self._close()
        else:
            self._end(self._reading)

    def sweep(self, now: float, late: float) -> None:
        """Close the connection, or its request, if it is too slow. `late` are seconds in which nobody was served."""
        self._due += late
        if now < self._due:
            return
        if self._output_full:
            left = self._transport.get_write_buffer_size()
            slow, self._moved = self._moved - left < self._limits.window_bytes, left
        elif self._reading is not None and self._reading in self._queue:
            slow, self._moved = self._moved < self._limits.window_bytes, 0
        else:
            slow = not self._queue
        if not slow:
            self._due = now + self._limits.window_s
        elif self._reading is not None and self._reading in self._queue and not self._output_full:
            self._break_off(TOO_SLOW)
        else:
            self.abort()

    def _bytes_left(self) -> int:
        """Bytes of a long body of declared length that are due: the parser would only copy them."""
        exchange = self._reading
        if exchange is None or not exchange.head_done or self._deaf or TRANSFER in exchange.fields:
            return 0
        left = int(exchange.fields.get(LENGTH, b"0")) - exchange.body_bytes
        return left if left > SEPARATE_BODY else 0

    def _read_past_parser(self, data: bytes) -> bytes:
        """Read a body; return what follows it, which a parser that has seen nothing before reads."""
        piece = data[: self._left]
        self._left -= len(piece)
        self.on_body(piece)
        if self._left == 0:
            self._parser = httptools.HttpRequestParser(self)
            self.on_message_complete()
        return data[len(piece) :]

    def _run(self, exchange: Exchange) -> None:
        consumer = exchange.consumer
        assert consumer is not None
        if not exchange.started:
            exchange.started = True
            if consumer.waits_for_body and exchange.expects_continue and not exchange.complete:
                self._transport.write(CONTINUE)
            self._guard(exchange, consumer.start)
        if exchange.complete and not exchange.handed and exchange.answer is None:
            exchange.handed = True
            self._guard(exchange, consumer.complete)

    def _fault(self, exchange: Exchange, version: str) -> Answer | None:
        waiting = sum(one.head_bytes for one in self._queue if one is not exchange)
        fault = CROWDED if len(self._queue) > MAX_PIPELINED or waiting > self._limits.head_bytes else None
        fault = fault or fault_of_head(exchange, version, self._parser.should_upgrade(), self._limits.head_bytes)
        if fault is not None:
            exchange.keep_alive = False
        return fault

    def _open(self, exchange: Exchange) -> Consumer | Answer:
        try:
            return self._service.open(exchange)
        except Exception:
            logger.exception("a request failed at its head")
            return FAILED

    def _guard(self, exchange: Exchange, step: Callable[[], None]) -> None:
        """Run a step of a consumer; whatever it raises fails its request alone."""
        try:
            step()
        except Exception:
            logger.exception("a request failed")
            if exchange.answer is None and exchange.consumer is not None:
                exchange.consumer.dropped(FAILED.status)
                exchange.finish(FAILED)

    def _write(self, exchange: Exchange, answer: Answer) -> None:
        close = not exchange.keep_alive
        top = head(answer, close=close)
        body = b"" if exchange.method == b"HEAD" else answer.body
        if len(body) > SEPARATE_BODY:
            self._transport.write(top)
            self._transport.write(body)
        else:
            self._transport.write(top + body)
        if exchange.consumer is not None:
            self._held.append(exchange.consumer)
            if not self._output_full:
                self._release()
        if close:
            self._end(exchange)
        elif not self._queue:
            self._set_due()
            self._table.at_rest()

    def _end(self, exchange: Exchange) -> None:
        """Close after an answer. A client that still sends would lose the answer to a reset: its bytes are dropped."""
        self._drop_queue(HANG_UP)
        if self._client_closed:
            self._close()
            return
        if not self._output_full:
            self._due = self._loop.time() + (self._limits.linger_s if exchange.complete else self._limits.head_s)
        self._deaf = self._ending = True
        with suppress(OSError):  # a client that has reset its connection is gone in the next turn
            self._transport.write_eof()
        self._table.at_rest()

    def _break_off(self, answer: Answer) -> None:
        """Answer the request whose bytes arrive, or would, and read no more."""
        if self._ending:
            return
        exchange, self._reading, self._deaf = self._reading, None, True
        if exchange is not None and exchange.head_done and exchange not in self._queue:
            self._close()  # it is answered already
            return
        if exchange is None or not exchange.head_done:
            exchange = Exchange(self.flush, self._trust)
            self._queue.append(exchange)
        exchange.keep_alive = False
        if exchange.answer is None:
            exchange.answer = answer
            if exchange.consumer is not None:
                exchange.consumer.dropped(answer.status)
        self.flush()

    def _close(self) -> None:
        """Close once what was written has left; `sweep` ends it if the client does not read."""
        self._deaf = self._ending = True
        self._transport.close()
        if not self._output_full:
            self._due = self._loop.time() + self._limits.linger_s

    def _trust(self) -> None:
        if not self._trusted:
            self._trusted = True
            self._table.trust(self)

    def _set_due(self) -> None:
        """Set when to look at this connection next, from what it waits for."""
        limits, reading = self._limits, self._reading
        if self._output_full or self._ending:
            return
        if reading is not None and reading in self._queue:
            seconds, self._moved = limits.window_s, 0
        elif self._queue:
            seconds = math.inf
        elif reading is not None:
            seconds = limits.head_s
        else:
            seconds = limits.idle_s if self._trusted else limits.stranger_s
        self._due = self._loop.time() + seconds

    def _drop_queue(self, status: int) -> None:
        waiting = [*self._queue]
        self._queue.clear()
        for exchange in waiting:
            if exchange.answer is None:
                exchange.answer = NO_ANSWER
                if exchange.consumer is not None:
                    exchange.consumer.dropped(status)
            if exchange.consumer is not None:
                exchange.consumer.sent()

    def _release(self) -> None:
        held, self._held = self._held, []
        for consumer in held:
            consumer.sent()
