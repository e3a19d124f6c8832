"""A reward server's application in this process: its real batchers and routes, without a socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import httpx

from reward_servers.app import Served, ServerApp
from reward_servers.batcher import Batcher, BatchLimits, Device
from reward_servers.limits import RequestLimits
from reward_servers.main import server_info
from reward_servers.metrics import ServerMetrics
from reward_servers.scorers.base import Scorer

LIMITS = RequestLimits(max_body_bytes=2**20, max_pixels=64 * 64, deadline_s=30.0, token=None)
BATCH = BatchLimits(max_batch=4, max_wait_s=0.0, queue_images=8)


@asynccontextmanager
async def serving_app(
    scorers: Mapping[str, Scorer],
    limits: RequestLimits = LIMITS,
    batch: BatchLimits = BATCH,
    queue_bytes: int = 2**22,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application; the scorers are served as they are, without a start-up check."""
    metrics, device = ServerMetrics(), Device(clock)
    served = []
    for name, scorer in scorers.items():
        counters = metrics.of_scorer(name, *scorer.score_range)
        batcher = Batcher(scorer, name, batch, device, counters)
        prefix, info = f"/{name}" if len(scorers) > 1 else "", server_info(name, scorer, not batch.share_calls)
        served.append(Served(prefix, info, batcher, counters, 0.5))
    feeding = [asyncio.create_task(one.batcher.run()) for one in served]
    transport = httpx.ASGITransport(ServerApp(served, limits, queue_bytes, device, metrics).build())
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client
    finally:
        for task in feeding:
            task.cancel()
        device.close()
