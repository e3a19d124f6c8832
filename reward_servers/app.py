"""The HTTP face of a scorer (see common.reward_api for the contract). It knows neither torch nor what a score means."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from common.errors import RewardError, RewardOverloaded, RewardRejected, RewardUnavailable, WireError
from common.reward_api import (
    GRADIENT_PATH,
    HEALTH_PATH,
    INFO_PATH,
    MEDIA_TYPE,
    METRICS_PATH,
    READY_PATH,
    SCORE_PATH,
    GradientRequest,
    ScoreRequest,
    ServerInfo,
)
from reward_servers.batcher import Batcher
from reward_servers.metrics import ServerMetrics

JSON_TYPE = "application/json"
CLIENT_GONE = 499
STATUS_OF_CAUSE = {
    "request": 422,
    "too_large": 413,
    "unauthorized": 401,
    "not_differentiable": 404,
    "overloaded": 429,
    "deadline": 504,
}

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class AppLimits:
    """Bytes of a request body, seconds a request may take in all, and the bearer token (None: none is asked for)."""

    max_body_bytes: int
    deadline_s: float
    token: str | None


class RewardService:
    """The routes. Build it once the scorer has passed its probe: `/readyz` reports that probe's score."""

    def __init__(
        self, batcher: Batcher, info: ServerInfo, metrics: ServerMetrics, limits: AppLimits, probe_score: float
    ) -> None:
        self._batcher = batcher
        self._info = info
        self._metrics = metrics
        self._limits = limits
        self._probe_score = probe_score

    def build_app(self) -> FastAPI:
        app = FastAPI(title="reward server", openapi_url=None)
        app.add_api_route(SCORE_PATH, self.score, methods=["POST"])
        app.add_api_route(GRADIENT_PATH, self.gradient, methods=["POST"])
        app.add_api_route(INFO_PATH, self.info, methods=["GET"])
        app.add_api_route(HEALTH_PATH, self.health, methods=["GET"])
        app.add_api_route(READY_PATH, self.ready, methods=["GET"])
        app.add_api_route(METRICS_PATH, self.metrics, methods=["GET"])
        return app

    async def score(self, request: Request) -> Response:
        return await self._answer(request, SCORE_PATH, self._score)

    async def gradient(self, request: Request) -> Response:
        return await self._answer(request, GRADIENT_PATH, self._gradient)

    async def info(self, request: Request) -> Response:
        return await self._answer(request, INFO_PATH, self._describe)

    async def health(self) -> Response:
        return Response(b'{"alive": true}', media_type=JSON_TYPE)

    async def ready(self) -> Response:
        body = json.dumps({"ready": True, "probe_score": self._probe_score})
        return Response(body, media_type=JSON_TYPE)

    async def metrics(self) -> Response:
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: Request, path: str, handler: Handler) -> Response:
        """Authorise, handle within the deadline, turn our errors into status codes, count."""
        started = time.perf_counter()
        try:
            self._authorise(request)
            async with asyncio.timeout(self._limits.deadline_s):
                response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except TimeoutError:
            message = f"no answer within {self._limits.deadline_s:g} s"
            response = _error_response(RewardUnavailable(self._info.scorer, "deadline", message))
        except (RewardError, WireError) as error:
            response = _error_response(error)
        self._metrics.answered(path, response.status_code, time.perf_counter() - started)
        return response

    async def _score(self, request: Request) -> Response:
        body = await self._read_body(request)
        return await self._through_batcher(request, ScoreRequest.from_bytes(body, self._limits.max_body_bytes))

    async def _gradient(self, request: Request) -> Response:
        if not self._info.differentiable:
            message = f"the scorer {self._info.scorer} is not differentiable"
            raise RewardRejected(self._info.scorer, "not_differentiable", message)
        body = await self._read_body(request)
        return await self._through_batcher(request, GradientRequest.from_bytes(body, self._limits.max_body_bytes))

    async def _describe(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._info.to_json(), media_type=JSON_TYPE)

    def _authorise(self, request: Request) -> None:
        if self._limits.token is None:
            return
        expected = f"Bearer {self._limits.token}".encode()
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, expected):
            raise RewardRejected(self._info.scorer, "unauthorized", "the bearer token is missing or wrong")

    async def _read_body(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        declared = request.headers.get("content-length", "0")
        body = bytearray()
        if int(declared) <= limit:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        message = f"the body exceeds {limit} bytes: send fewer images at once or raise --max-body-mb"
        raise RewardRejected(self._info.scorer, "too_large", message)

    async def _through_batcher(self, request: Request, message: ScoreRequest | GradientRequest) -> Response:
        """Wait for the answer, or for the client to hang up: the withdrawn request is then never executed."""
        answer = self._batcher.submit(message)
        # The body is read, so the next thing the client can say is that it is gone.
        hang_up = asyncio.ensure_future(request.receive())
        try:
            either: set[asyncio.Future[Any]] = {answer, hang_up}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return Response(answer.result().to_bytes(), media_type=MEDIA_TYPE)
        finally:
            hang_up.cancel()
            answer.cancel()


def _error_response(error: RewardError | WireError) -> Response:
    """RewardInvalid (a scorer that failed or answered nonsense) is the server's own fault: 500."""
    cause, status = ("wire", 400)
    if isinstance(error, RewardError):
        cause, status = error.cause, STATUS_OF_CAUSE.get(error.cause, 500)
    headers = {"retry-after": f"{error.retry_after:g}"} if isinstance(error, RewardOverloaded) else {}
    body = json.dumps({"error": cause, "message": str(error)})
    return Response(body, status_code=status, media_type=JSON_TYPE, headers=headers)
