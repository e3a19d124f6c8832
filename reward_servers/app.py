"""All routes of a process: the scoring routes of each scorer, and the pages of the process behind Starlette.

`common.rewards.api` defines the contract. A scoring route never meets Starlette: see `reward_servers.scoring`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.errors import RewardRejected
from common.rewards.api import (
    DOCS_PATH,
    HEALTH_PATH,
    INFO_PATH,
    METRICS_PATH,
    OPENAPI_PATH,
    READY_PATH,
    UNIRL_HEALTH_PATH,
)
from reward_servers import docs_page, unirl
from reward_servers.batcher import RESTART, Device
from reward_servers.doors import Door
from reward_servers.front.answers import JSON_TYPE, Answer, error_answer
from reward_servers.front.exchange import Consumer, Exchange
from reward_servers.front.pages import TRUST, Page
from reward_servers.limits import Readers, RequestLimits
from reward_servers.metrics import ServerMetrics
from reward_servers.model_process.supervisor import Supervisor
from reward_servers.openapi import describe
from reward_servers.scoring import ScoringService, Served, refusal_of


class ServerApp:
    """The service behind a process's port."""

    def __init__(
        self,
        served: Sequence[Served],
        limits: RequestLimits,
        queue_bytes: int,
        devices: Sequence[Device],
        metrics: ServerMetrics,
        readers: Readers,
        doors: Sequence[Door],
        supervisors: Sequence[Supervisor] = (),
    ) -> None:
        self._served = served
        self._limits = limits
        self._devices = devices
        self._supervisors = supervisors
        self._readers = readers
        self._metrics = metrics
        scorers = [(one.prefix, one.info) for one in served]
        self._document = json.dumps(describe(scorers, limits, doors)).encode()
        self._docs = docs_page.page(scorers, limits, queue_bytes, doors)
        services = [ScoringService(one, limits, queue_bytes, readers) for one in served]
        self._scoring: dict[bytes, tuple[ScoringService, Door]] = {
            path.encode(): (service, door)
            for one, service in zip(served, services, strict=True)
            for door in doors
            for path in _paths(one.prefix, door)
        }
        self._pages = self._build_pages(services)

    def open(self, exchange: Exchange) -> Consumer | Answer:
        """Decide on a request at its head."""
        path = exchange.path
        found = self._scoring.get(path)
        if found is None:
            return Page(self._pages, exchange, path)
        if exchange.method != b"POST":
            message = self._no_route(exchange.method.decode("ascii"), path.decode())
            return error_answer(405, "not_found", message, {"allow": "POST"})
        service, door = found
        return service.open(exchange, door)

    def _build_pages(self, services: Sequence[ScoringService]) -> Starlette:
        pages: dict[str, Callable[[Request], Awaitable[Response]]] = {
            HEALTH_PATH: self.health,
            READY_PATH: self.ready,
            METRICS_PATH: self.metrics,
            OPENAPI_PATH: self.openapi,
            DOCS_PATH: self.docs,
        }
        for one, service in zip(self._served, services, strict=True):
            pages[one.prefix + INFO_PATH] = _info_page(one, service)
            pages[one.prefix + UNIRL_HEALTH_PATH] = _unirl_page(one)
        app = Starlette(
            routes=[Route(path, page, methods=["GET"]) for path, page in pages.items()],
            exception_handlers={HTTPException: self._no_such_page},
        )
        app.router.redirect_slashes = False
        return app

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"alive": True})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """503 while a model is loading again, and while a call or a reader outlasts every request it was made for."""
        for problem in [one.problem for one in self._supervisors]:
            if problem is not None:
                return _json({"error": "model", "message": problem}, 503)
        calls = [("model call", device.call_seconds, device.stuck) for device in self._devices]
        for what, seconds, way_out in [*calls, ("reader", self._readers.call_seconds, RESTART)]:
            if seconds > self._limits.deadline_s:
                message = (
                    f"a {what} has been running for {seconds:.0f} s, the deadline is {self._limits.deadline_s:g} s"
                )
                return _json({"error": "deadline", "message": f"{message}: {way_out}"}, 503)
        return _json({"ready": True, "probe_scores": {one.info.scorer: one.check_score for one in self._served}})

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._document, media_type=JSON_TYPE)

    async def docs(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self._docs, media_type=docs_page.MEDIA_TYPE, headers=docs_page.POLICY)

    async def _no_such_page(self, request: Request, error: Exception) -> Response:
        """404 and 405, with the routes that exist."""
        assert isinstance(error, HTTPException)
        message = self._no_route(request.method, request.url.path)
        return _json({"error": "not_found", "message": message}, error.status_code, error.headers)

    def _no_route(self, method: str, path: str) -> str:
        bases = " and ".join(f"http://HOST:PORT{one.prefix}" for one in self._served)
        told = (
            f"{method} {path}: no such route; the URL of a reward here is {bases}, and all routes are at {OPENAPI_PATH}"
        )
        if method == "POST" and path.rstrip("/") in {one.prefix for one in self._served}:
            told += "; clients of Flow-GRPO and verl-omni need a server with --accept-flow-grpo"
        return told


def _paths(prefix: str, door: Door) -> set[str]:
    """The paths of a route; one that ends in a slash has the path without it as well, which is the scorer's own URL."""
    path = prefix + door.path
    return {path, path.rstrip("/") or path}


def _info_page(served: Served, service: ScoringService) -> Callable[[Request], Awaitable[Response]]:
    """The identity of a scorer, for those who may use it."""

    async def info(request: Request) -> Response:
        started = time.perf_counter()
        try:
            service.admit(dict(request.scope["headers"]))
        except RewardRejected as error:
            refusal = refusal_of(error)
            headers = dict(line.split(": ", 1) for line in refusal.fields.decode("latin-1").splitlines())
            response = Response(refusal.body, refusal.status, headers)
        else:
            request.scope[TRUST]()
            response = Response(served.info.to_json(), media_type=JSON_TYPE)
        served.metrics.answered(INFO_PATH, response.status_code, time.perf_counter() - started)
        return response

    return info


def _unirl_page(served: Served) -> Callable[[Request], Awaitable[Response]]:
    async def health(request: Request) -> Response:  # noqa: ARG001
        return _json(unirl.health(served.info.scorer))

    return health


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status_code=status, media_type=JSON_TYPE, headers=headers)
