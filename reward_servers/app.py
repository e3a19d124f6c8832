"""The HTTP face of the scorers of a process (see common.reward_api for the contract). It knows neither torch nor what a
score means.

    head ─► token ─► room in the queue? bytes left? ─► body ─► size, shape ─► batcher ─► answer
             401          429, nothing was read         413       400, 413, 422   504, 500

Bodies are read, and large answers written, by a few threads of their own: neither belongs into the event loop.
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
# Of a content-length: an exabyte.
LENGTH_DIGITS = 18
# Few, because they take cores and memory bandwidth from the model.
READERS = 2
# Bytes of a body that is read sooner than a thread could take it over.
READ_AT_ONCE = 65_536
# A gradient request's body, its pixels, their gradient, and the answer that is packed from it.
GRADIENT_COPIES = 4
BEARER = "bearer"
STATUS_OF_CAUSE = {
    "wire": 400,
    "request": 422,
    "too_large": 413,
    "unauthorized": 401,
    "not_differentiable": 404,
    "overloaded": 429,
    "deadline": 504,
}

Handler = Callable[[Request, Holding], Awaitable[Response]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Served:
    """One scorer that has passed its probe.

    Attributes:
        prefix: what stands before its routes: "" or "/name".
        probe_score: what it scored the probe.
    """

    prefix: str
    info: ServerInfo
    batcher: Batcher
    metrics: ScorerMetrics
    probe_score: float


class ServerApp:
    """The routes of a process: those of each of its scorers, and those about itself."""

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
        """503 once a model call has outlasted every request it was made for: nothing will be answered until it ends."""
        seconds = self._device.call_seconds
        if seconds > self._limits.deadline_s:
            message = (
                f"a model call has been running for {seconds:.0f} s, the deadline is {self._limits.deadline_s:g} s"
            )
            return _json({"error": "deadline", "message": f"{message}: restart the server if it is stuck"}, 503)
        return _json({"ready": True, "probe_scores": {one.info.scorer: one.probe_score for one in self._served}})

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._document, media_type=JSON_TYPE)

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        """404 and 405, with the routes that exist."""
        assert isinstance(error, HTTPException)
        prefixes = ", ".join(one.prefix + SCORE_PATH for one in self._served)
        message = (
            f"{request.method} {request.url.path}: no such route; scores are at {prefixes}, all else at {OPENAPI_PATH}"
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
        """Authorise, handle within the deadline, turn our errors into status codes, count."""
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
        # The body and its pixels live side by side for a moment.
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
        """What `call` returns. The request's bytes stay held until the thread is done, also when nobody waits."""
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
        """Seconds this request may take: what the client asks for, at most our own limit."""
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
        """The body, unless it is too large or there is no room for `copies` of it: then nothing or little is read."""
        self._batcher.require_room()
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
        """Wait for the answer, or for the client to hang up: the withdrawn request is then never executed."""
        # The body is read, so the next thing the client can say is that it is gone.
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
        """RewardInvalid (a scorer that failed or answered nonsense) is the server's own fault: 500."""
        cause = error.cause if isinstance(error, RewardError) else "wire"
        headers = {"retry-after": f"{error.retry_after:g}"} if isinstance(error, RewardOverloaded) else {}
        if cause == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        return _json({"error": cause, "message": str(error)}, STATUS_OF_CAUSE.get(cause, 500), headers)


async def _at_once(call: Callable[[], Result]) -> Result:
    """What `call` returns, once it is known whether the client is still there."""
    await asyncio.sleep(0)
    return call()


def _declared_length(request: Request) -> int:
    """0 when the client does not say: what comes is then counted as it comes."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > LENGTH_DIGITS:
        raise RewardRejected(ANY_REWARD, "request", f"content-length is {declared!r}: a number of bytes")
    return int(declared)


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status_code=status, media_type=JSON_TYPE, headers=headers)
