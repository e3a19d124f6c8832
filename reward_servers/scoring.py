"""The scoring routes of one scorer, from a request's head to its answer. Uses no torch and does not interpret scores.

    head ─► token ─► room in the queue? bytes left? ─► body ─► size, shape ─► batcher ─► answer
             401          429, body not read           413       400, 413, 422   504, 503, 500

Nothing here waits: each step is a callback of the connection, a reader thread or the batcher.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import RewardError, RewardOverloaded, RewardRejected, RewardUnavailable, WireError
from common.rewards.api import ANY_REWARD, DEADLINE_HEADER, ServerInfo
from reward_servers.batcher import RETRY_AFTER_SECONDS, Batcher
from reward_servers.doors import Door, Opened
from reward_servers.fair_queue import ANONYMOUS, Request, Response
from reward_servers.front.answers import Answer, answer, error_answer
from reward_servers.front.exchange import AUTHORIZATION, DEADLINE, ENCODING, LENGTH, RUN, Consumer, Exchange
from reward_servers.limits import ByteBudget, Holding, Patience, Readers, RequestLimits
from reward_servers.metrics import ScorerMetrics
from reward_servers.scorers.base import ScorerLimits

BEARER = b"bearer"
UNCOMPRESSED = (b"", b"identity")
RUN_BYTES = 64
"""Only so much of a run's name is read."""
STATUS_OF_CAUSE = {
    "wire": 400,
    "request": 422,
    "too_large": 413,
    "encoding": 415,
    "unauthorized": 401,
    "not_differentiable": 404,
    "overloaded": 429,
    "deadline": 504,
    "model": 503,
}
OVERLOADED = error_answer(429, "overloaded", "the queue is full: try later", {"retry-after": f"{RETRY_AFTER_SECONDS}"})

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """One scorer that has scored its test image.

    Attributes:
        prefix: prefix of its routes: "" or "/name".
        check_score: its score for the test image.
        limits: what it takes of sizes and texts.
    """

    prefix: str
    info: ServerInfo
    batcher: Batcher
    metrics: ScorerMetrics
    check_score: float
    limits: ScorerLimits


class ScoringService:
    """Admits requests to one scorer, and knows what they share."""

    def __init__(self, served: Served, limits: RequestLimits, queue_bytes: int, readers: Readers) -> None:
        self.name = served.info.scorer
        self.limits = limits
        self.scorer_limits = served.limits
        self.batcher = served.batcher
        self.metrics = served.metrics
        self.readers = readers
        self._differentiable = served.info.differentiable
        self._budget = ByteBudget(self.name, queue_bytes, served.metrics)

    def open(self, exchange: Exchange, door: Door) -> Consumer | Answer:
        """Decide on a request at its head: an answer that refuses it, or the consumer of its body."""
        started = time.perf_counter()
        try:
            seconds = self.admit(exchange.fields)
            exchange.trust()
            if door.needs_gradient and not self._differentiable:
                message = f"the scorer {self.name} is not differentiable"
                raise RewardRejected(self.name, "not_differentiable", message)
            if not self.batcher.has_room(1, seconds, run_of(exchange.fields)):
                refusal = OVERLOADED
            else:
                _require_plain_body(exchange.fields)
                size = int(exchange.fields.get(LENGTH, b"0"))
                self.require_size(size)
                holding = Holding(self._budget)
                holding.require_room(door.copies * size)
                return ScoringRequest(self, door, exchange, seconds, holding, started)
        except RewardError as error:
            refusal = refusal_of(error)
        self.metrics.answered(door.path, refusal.status, time.perf_counter() - started)
        return refusal

    def admit(self, fields: Mapping[bytes, bytes]) -> float:
        """Check the token; return the seconds that the request may take: the client's, capped by our own limit."""
        token = self.limits.token
        if token is not None and not _is_bearer(fields.get(AUTHORIZATION, b""), token.encode()):
            raise RewardRejected(self.name, "unauthorized", "the bearer token is missing or wrong")
        asked = fields.get(DEADLINE)
        if asked is None:
            return self.limits.deadline_s
        try:
            seconds = float(asked)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            shown = asked.decode("latin-1")
            message = f"{DEADLINE_HEADER} is {shown!r}: a positive number of seconds"
            raise RewardRejected(self.name, "request", message)
        return min(seconds, self.limits.deadline_s)

    def require_size(self, size: int) -> None:
        if size > self.limits.max_body_bytes:
            message = f"the body exceeds {self.limits.max_body_bytes} bytes"
            raise RewardRejected(self.name, "too_large", f"{message}: send fewer images at once or raise --max-body-mb")


class ScoringRequest(Consumer):
    """One admitted request."""

    waits_for_body = True

    def __init__(
        self,
        service: ScoringService,
        door: Door,
        exchange: Exchange,
        seconds: float,
        holding: Holding,
        started: float,
    ) -> None:
        self._service = service
        self._door = door
        self._exchange = exchange
        self._seconds = seconds
        self._holding = holding
        self._started = started
        self._body = bytearray()
        self._patience = Patience(seconds)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._expire)
        self._answer: asyncio.Future[Response] | None = None
        self._over = False

    def body(self, piece: bytes) -> None:
        size = len(self._body) + len(piece)
        try:
            self._service.require_size(size)
            self._holding.grow_to(self._door.copies * size)
        except RewardError as error:
            self._refuse(error)
        else:
            self._body += piece

    def complete(self) -> None:
        in_thread = len(self._body) > self._door.at_once
        door, body, service = self._door, self._body, self._service
        self._call(lambda: door.open(body, service.limits, service.name, self._patience), self._opened, in_thread)

    def dropped(self, status: int) -> None:
        self._end(status)
        if self._answer is not None:
            self._answer.cancel()

    def sent(self) -> None:
        self._body = bytearray()
        self._holding.release()

    def _opened(self, opened: Opened) -> None:
        # The body and its pixels are both in memory for a moment.
        self._holding.grow_to(self._door.copies * len(self._body) + opened.more_bytes)
        in_thread = len(self._body) > self._door.at_once
        self._call(opened.decode, lambda request: self._decoded(request, opened), in_thread)

    def _decoded(self, request: Request, opened: Opened) -> None:
        self._service.scorer_limits.check(request)
        self._answer = self._service.batcher.submit(request, self._seconds, run_of(self._exchange.fields))
        self._answer.add_done_callback(lambda done: self._scored(done, opened))

    def _scored(self, done: asyncio.Future[Response], opened: Opened) -> None:
        if self._over or done.cancelled():
            return
        error = done.exception()
        if error is not None:
            self._fail(error)
            return
        response = done.result()
        # The gradients are as large as the images; scores alone are small.
        in_thread = self._door.needs_gradient and len(self._body) > self._door.at_once
        self._call(lambda: opened.encode(response), self._encoded, in_thread)

    def _encoded(self, content: bytes) -> None:
        self._finish(answer(200, self._door.media_type, content))

    def _call(self, call: Callable[[], Result], then: Callable[[Result], None], in_thread: bool) -> None:
        """Run `call` here or in a reader thread, then `then` here, unless the request is over by that time."""
        if in_thread:
            work = self._service.readers.submit(call)
            self._holding.read_by(work)
            work.add_done_callback(lambda done: self._back_in_loop(done, then))
            return
        try:
            then(call())
        except Exception as error:
            self._fail(error)

    def _back_in_loop(self, done: Future[Result], then: Callable[[Result], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._continue, done, then)

    def _continue(self, done: Future[Any], then: Callable[[Any], None]) -> None:
        if self._over or done.cancelled():
            return
        try:
            then(done.result())
        except Exception as error:
            self._fail(error)

    def _expire(self) -> None:
        error = RewardUnavailable(self._service.name, "deadline", f"no answer within {self._seconds:g} s")
        self._refuse(error)
        if self._answer is not None:
            self._answer.cancel()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, RewardError | WireError):
            self._refuse(error)
            return
        logger.error("a request to %s failed", self._service.name, exc_info=error)
        self._finish(error_answer(500, "scorer", f"the server failed: {type(error).__name__}; its log says why"))

    def _refuse(self, error: RewardError | WireError) -> None:
        self._finish(refusal_of(error))

    def _finish(self, given: Answer) -> None:
        if not self._over:
            self._end(given.status)
            self._exchange.finish(given)

    def _end(self, status: int) -> None:
        """Count the request; nothing happens to it from now on."""
        if not self._over:
            self._over = True
            self._timer.cancel()
            self._patience.end()
            self._service.metrics.answered(self._door.path, status, time.perf_counter() - self._started)


def refusal_of(error: RewardError | WireError) -> Answer:
    """RewardInvalid means that the scorer failed or returned invalid scores, which is the server's fault: 500."""
    cause = error.cause if isinstance(error, RewardError) else "wire"
    headers = {"retry-after": f"{error.retry_after:g}"} if isinstance(error, RewardOverloaded) else {}
    if cause == "unauthorized":
        headers["www-authenticate"] = "Bearer"
    return error_answer(STATUS_OF_CAUSE.get(cause, 500), cause, str(error), headers)


def run_of(fields: Mapping[bytes, bytes]) -> bytes:
    """The run that a request names."""
    return fields.get(RUN, ANONYMOUS)[:RUN_BYTES]


def _is_bearer(given: bytes, token: bytes) -> bool:
    scheme, _, credentials = given.partition(b" ")
    right = secrets.compare_digest(credentials.strip(), token)
    return right and scheme.lower() == BEARER


def _require_plain_body(fields: Mapping[bytes, bytes]) -> None:
    """A compressed body could be of any size once it is unpacked."""
    encoding = fields.get(ENCODING, b"").strip()
    if encoding.lower() not in UNCOMPRESSED:
        shown = encoding.decode("latin-1")
        message = f"content-encoding {shown!r} is not supported: send the body uncompressed, without this header"
        raise RewardRejected(ANY_REWARD, "encoding", message)
