"""A reward server in this process: its real batchers, routes and front, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import httpx

from reward_servers.app import ServerApp
from reward_servers.batcher import Batcher, BatchLimits, Device
from reward_servers.doors import DOORS, Door
from reward_servers.front.connections import ConnectionLimits, Connections
from reward_servers.front.exchange import Service
from reward_servers.front.listener import accept
from reward_servers.limits import Readers, RequestLimits
from reward_servers.main import server_info
from reward_servers.metrics import ServerMetrics
from reward_servers.scorers.base import Scorer
from reward_servers.scoring import Served

LIMITS = RequestLimits(max_body_bytes=2**20, max_pixels=64 * 64, deadline_s=30.0, token=None)
BATCH = BatchLimits(max_batch=4, max_wait_s=0.0, queue_images=8)
ANSWER_SECONDS = 60.0


@asynccontextmanager
async def serving_app(
    scorers: Mapping[str, Scorer],
    limits: RequestLimits = LIMITS,
    batch: BatchLimits = BATCH,
    queue_bytes: int = 2**22,
    clock: Callable[[], float] = time.monotonic,
    connections: ConnectionLimits | None = None,
    doors: Sequence[Door] = DOORS,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server; the scorers are served as they are, without a start-up check."""
    async with (
        service_of(scorers, limits, batch, queue_bytes, clock, doors) as service,
        listening(service, connections or ConnectionLimits()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS, trust_env=False) as client,
    ):
        yield client


@asynccontextmanager
async def service_of(
    scorers: Mapping[str, Scorer],
    limits: RequestLimits = LIMITS,
    batch: BatchLimits = BATCH,
    queue_bytes: int = 2**22,
    clock: Callable[[], float] = time.monotonic,
    doors: Sequence[Door] = DOORS,
) -> AsyncIterator[ServerApp]:
    """All routes of a server, without a port."""
    metrics, device, readers = ServerMetrics(), Device(clock), Readers(clock)
    served = []
    for name, scorer in scorers.items():
        counters = metrics.of_scorer(name, *scorer.score_range)
        batcher = Batcher(scorer, name, batch, device, counters)
        prefix, info = f"/{name}" if len(scorers) > 1 else "", server_info(name, scorer, not batch.share_calls)
        served.append(Served(prefix, info, batcher, counters, 0.5, scorer.limits))
    feeding = [asyncio.create_task(one.batcher.run()) for one in served]
    try:
        yield ServerApp(served, limits, queue_bytes, [device], metrics, readers, doors)
    finally:
        for task in feeding:
            task.cancel()
        device.close()
        readers.close()


@asynccontextmanager
async def listening(service: Service, limits: ConnectionLimits) -> AsyncIterator[int]:
    """The port of a front for `service`; at the end every connection is closed."""
    table = Connections(limits)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        tasks = [asyncio.create_task(accept(service, listener, table)), asyncio.create_task(table.sweep())]
        try:
            yield listener.getsockname()[1]
        finally:
            for task in tasks:
                task.cancel()
            for member in table.each():
                member.abort()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)
