"""HTTP routes for the scorers of a process (`common.rewards.api` defines the contract). This layer uses no torch and
does not interpret scores.

    head ─► token ─► room in the queue? bytes left? ─► body ─► size, shape ─► batcher ─► response
             401          429, body not read           413       400, 413, 422   504, 500

A few dedicated threads read bodies and write large responses, because both would block the event loop.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from common.errors import RewardError, RewardOverloaded, RewardRejected, RewardUnavailable, WireError
from common.rewards.api import (
    ANY_REWARD,
    DEADLINE_HEADER,
    GRADIENT_PATH,
    HEALTH_PATH,
    INFO_PATH,
    MEDIA_TYPE,
    METRICS_PATH,
    OPENAPI_PATH,
    PLAIN_SCORE_PATH,
    READY_PATH,
    SCORE_PATH,
    GradientRequest,
    GradientResponse,
    ScoreRequest,
    ScoreResponse,
    ServerInfo,
)
from reward_servers import plain_json
from reward_servers.batcher import Batcher, Device
from reward_servers.limits import ByteBudget, Holding, RequestLimits
from reward_servers.metrics import ScorerMetrics, ServerMetrics
from reward_servers.openapi import describe

JSON_TYPE = "application/json"
CLIENT_GONE = 499
LENGTH_DIGITS = 18
"""A content-length may have at most this many digits: that is an exabyte."""
READERS = 2
"""There are few reader threads, because they take cores and memory bandwidth from the model."""
READ_AT_ONCE = 65_536
"""A body of at most this many bytes is read in the event loop: that is faster than handing it to a thread."""
GRADIENT_COPIES = 4
"""A gradient request holds four copies of its body: body, pixels, their gradient and the packed response."""
BEARER = "bearer"
UNCOMPRESSED = ("", "identity")
STATUS_OF_CAUSE = {
    "wire": 400,
    "request": 422,
    "too_large": 413,
    "encoding": 415,
    "unauthorized": 401,
    "not_differentiable": 404,
    "overloaded": 429,
    "deadline": 504,
}

Handler = Callable[[Request, Holding], Awaitable[Response]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Served:
    """One scorer that has scored its test image.

    Attributes:
        prefix: prefix of its routes: "" or "/name".
        check_score: its score for the test image.
    """

    prefix: str
    info: ServerInfo
    batcher: Batcher
    metrics: ScorerMetrics
    check_score: float


class ServerApp:
    """All routes of a process: those of each scorer and those of the process itself."""

    def __init__(
        self,
        served: Sequence[Served],
        limits: RequestLimits,
        queue_bytes: int,
        device: Device,
        metrics: ServerMetrics,
    ) -> None:
        self._served = served
        self._limits = limits
        self._device = device
        readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._services = [RewardService(one, limits, queue_bytes, readers) for one in served]
        self._metrics = metrics
        self._document = json.dumps(describe([(one.prefix, one.info) for one in served], limits)).encode()

    def build(self) -> Starlette:
        routes = [route for service in self._services for route in service.routes()]
        routes += [
            Route(HEALTH_PATH, self.health, methods=["GET"]),
            Route(READY_PATH, self.ready, methods=["GET"]),
            Route(METRICS_PATH, self.metrics, methods=["GET"]),
            Route(OPENAPI_PATH, self.openapi, methods=["GET"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_route})
        app.router.redirect_slashes = False
        return app

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"alive": True})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """503 while a model call outlasts every request it was made for: nothing is answered until the call ends."""
        seconds = self._device.call_seconds
        if seconds > self._limits.deadline_s:
            message = (
                f"a model call has been running for {seconds:.0f} s, the deadline is {self._limits.deadline_s:g} s"
            )
            return _json({"error": "deadline", "message": f"{message}: restart the server if it is stuck"}, 503)
        return _json({"ready": True, "probe_scores": {one.info.scorer: one.check_score for one in self._served}})

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._document, media_type=JSON_TYPE)

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        """404 and 405, with the routes that exist."""
        assert isinstance(error, HTTPException)
        bases = " and ".join(f"http://HOST:PORT{one.prefix}" for one in self._served)
        message = (
            f"{request.method} {request.url.path}: no such route; the URL of a reward here is {bases}, and all routes "
            f"are at {OPENAPI_PATH}"
        )
        return _json({"error": "not_found", "message": message}, error.status_code, error.headers)


class RewardService:
    """The routes of one scorer."""

    def __init__(self, served: Served, limits: RequestLimits, queue_bytes: int, readers: ThreadPoolExecutor) -> None:
        self._prefix = served.prefix
        self._info = served.info
        self._batcher = served.batcher
        self._metrics = served.metrics
        self._limits = limits
        self._budget = ByteBudget(served.info.scorer, queue_bytes, served.metrics)
        self._readers = readers

    def routes(self) -> list[Route]:
        handlers = {SCORE_PATH: self._score, GRADIENT_PATH: self._gradient, PLAIN_SCORE_PATH: self._plain_score}
        posts = [self._route(path, "POST", handler) for path, handler in handlers.items()]
        return [*posts, self._route(INFO_PATH, "GET", self._describe)]

    def _route(self, path: str, method: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            return await self._answer(request, path, handler)

        return Route(self._prefix + path, endpoint, methods=[method])

    async def _answer(self, request: Request, path: str, handler: Handler) -> Response:
        """Authorise, handle within the deadline, turn our errors into status codes, and count the request."""
        started = time.perf_counter()
        seconds = self._limits.deadline_s
        try:
            self._authorise(request)
            seconds = self._deadline(request)
            with self._budget.hold() as holding:
                async with asyncio.timeout(seconds):
                    response = await handler(request, holding)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except TimeoutError:
            response = self._error(RewardUnavailable(self._info.scorer, "deadline", f"no answer within {seconds:g} s"))
        except (RewardError, WireError) as error:
            response = self._error(error)
        self._metrics.answered(path, response.status_code, time.perf_counter() - started)
        return response

    async def _score(self, request: Request, holding: Holding) -> Response:
        body = await self._read_body(request, holding)
        answer = await self._through_batcher(request, self._parse(ScoreRequest, body, holding))
        return Response(answer.to_bytes(), media_type=MEDIA_TYPE)

    async def _gradient(self, request: Request, holding: Holding) -> Response:
        if not self._info.differentiable:
            message = f"the scorer {self._info.scorer} is not differentiable"
            raise RewardRejected(self._info.scorer, "not_differentiable", message)
        body = await self._read_body(request, holding, GRADIENT_COPIES)
        answer = await self._through_batcher(request, self._parse(GradientRequest, body, holding))
        return Response(await self._in_thread(answer.to_bytes, holding), media_type=MEDIA_TYPE)

    async def _plain_score(self, request: Request, holding: Holding) -> Response:
        body = await self._read_body(request, holding)
        plain = await self._in_thread(lambda: plain_json.parse(body, self._limits), holding)
        # The body and its pixels are both in memory for a moment.
        holding.grow_to(len(body) + plain.decoded_bytes)
        answer = await self._through_batcher(request, self._in_thread(plain.decode, holding))
        return Response(plain.answer(answer.scores_B.tolist()), media_type=JSON_TYPE)

    def _parse(
        self, kind: type[ScoreRequest | GradientRequest], body: bytearray, holding: Holding
    ) -> Awaitable[ScoreRequest | GradientRequest]:
        limits = self._limits

        def read() -> ScoreRequest | GradientRequest:
            return kind.from_bytes(body, limits.max_body_bytes, limits.max_pixels)

        return self._in_thread(read, holding) if len(body) > READ_AT_ONCE else _at_once(read)

    async def _in_thread(self, call: Callable[[], Result], holding: Holding) -> Result:
        """Run `call` in a reader thread. The request holds its bytes until the thread ends, even without a client."""
        work = self._readers.submit(call)
        holding.read_by(work)
        return await asyncio.wrap_future(work)

    async def _describe(self, request: Request, holding: Holding) -> Response:  # noqa: ARG002
        return Response(self._info.to_json(), media_type=JSON_TYPE)

    def _authorise(self, request: Request) -> None:
        if self._limits.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(given.strip().encode(), self._limits.token.encode())
        if scheme.lower() != BEARER or not right:
            raise RewardRejected(self._info.scorer, "unauthorized", "the bearer token is missing or wrong")

    def _deadline(self, request: Request) -> float:
        """Seconds this request may take: the client's deadline, capped by our own limit."""
        asked = request.headers.get(DEADLINE_HEADER)
        if asked is None:
            return self._limits.deadline_s
        try:
            seconds = float(asked)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            message = f"{DEADLINE_HEADER} is {asked!r}: a positive number of seconds"
            raise RewardRejected(self._info.scorer, "request", message)
        return min(seconds, self._limits.deadline_s)

    async def _read_body(self, request: Request, holding: Holding, copies: int = 1) -> bytearray:
        """Read the body. If it is too large or `copies` of it do not fit in memory, little or nothing of it is read."""
        self._batcher.require_room()
        _require_plain_body(request)
        self._reserve(holding, _declared_length(request), copies)
        body = bytearray()
        async for chunk in request.stream():
            self._reserve(holding, len(body) + len(chunk), copies)
            body += chunk
        return body

    def _reserve(self, holding: Holding, size: int, copies: int) -> None:
        if size > self._limits.max_body_bytes:
            message = f"the body exceeds {self._limits.max_body_bytes} bytes"
            raise RewardRejected(
                self._info.scorer, "too_large", f"{message}: send fewer images at once or raise --max-body-mb"
            )
        holding.grow_to(copies * size)

    async def _through_batcher(
        self, request: Request, parsing: Awaitable[ScoreRequest | GradientRequest]
    ) -> ScoreResponse | GradientResponse:
        """Wait for the response or for the client to disconnect; a disconnected client's request is withdrawn unrun."""
        # The body has been read, so the next message can only be the client's disconnect.
        hang_up = asyncio.ensure_future(request.receive())
        answer: asyncio.Future[Any] | None = None
        try:
            message = await parsing
            if hang_up.done():
                raise ClientDisconnect
            answer = self._batcher.submit(message)
            pending: set[asyncio.Future[Any]] = {answer, hang_up}
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            hang_up.cancel()
            if answer is not None:
                answer.cancel()

    def _error(self, error: RewardError | WireError) -> Response:
        """RewardInvalid means that the scorer failed or returned invalid scores, which is the server's fault: 500."""
        cause = error.cause if isinstance(error, RewardError) else "wire"
        headers = {"retry-after": f"{error.retry_after:g}"} if isinstance(error, RewardOverloaded) else {}
        if cause == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        return _json({"error": cause, "message": str(error)}, STATUS_OF_CAUSE.get(cause, 500), headers)


async def _at_once(call: Callable[[], Result]) -> Result:
    """Run `call` after one turn of the event loop, so that a disconnected client is noticed first."""
    await asyncio.sleep(0)
    return call()


def _require_plain_body(request: Request) -> None:
    """A compressed body could be of any size once it is unpacked."""
    encoding = request.headers.get("content-encoding", "").strip()
    if encoding.lower() not in UNCOMPRESSED:
        message = f"content-encoding {encoding!r} is not supported: send the body uncompressed, without this header"
        raise RewardRejected(ANY_REWARD, "encoding", message)


def _declared_length(request: Request) -> int:
    """The content-length, or 0 without one; bytes are then counted as they arrive."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > LENGTH_DIGITS:
        raise RewardRejected(ANY_REWARD, "request", f"content-length is {declared!r}: a number of bytes")
    return int(declared)


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status_code=status, media_type=JSON_TYPE, headers=headers)
