"""Start a reward server: read the command line, load the scorers, test them, serve until stopped.

    options ─► port bound ─► models loaded ─► a batcher each ─► tests ─► open ─► ... ─► SIGTERM, drain

This process needs none of the scorers' libraries (torch, transformers, ...): the models have processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np

from common.command import exit_status
from common.errors import ModelError, RewardError
from common.process_log import report_to_driver
from common.rewards.api import GradientRequest, ServerInfo
from common.whole_files import write_whole
from reward_servers.app import ServerApp
from reward_servers.batcher import Batcher
from reward_servers.doors import DOORS, FlowGrpoDoor
from reward_servers.front.connections import ConnectionLimits, Connections
from reward_servers.limits import Readers
from reward_servers.metrics import ScorerMetrics, ServerMetrics
from reward_servers.model_process.supervisor import Supervisor
from reward_servers.models import Model, loaded_models, stop, supervisors_of
from reward_servers.options import USAGE_ERROR, ServerSettings, build_parser, check
from reward_servers.process import bind, follow_parent, run, serve_http
from reward_servers.registration import registered
from reward_servers.scorers.base import Scorer
from reward_servers.scoring import Served

SWITCH_SECONDS = 0.0005
"""The event loop waits at most this long for a thread that computes in Python, a reader or a scorer.

Python's default of 5 ms, which a request may meet several times, is longer than all other costs of serving.
"""


def main(arguments: list[str] | None = None) -> int:
    """Serve; 0 after a drained stop, 2 with one line on stderr when the server cannot start."""
    return exit_status(
        lambda: _serve(build_parser().parse_args(arguments)), prefix="reward_servers", failed=USAGE_ERROR
    )


def _serve(options: argparse.Namespace) -> None:
    # Set before a scorer's stack is imported: OpenMP and MKL read it once, for every thread of the process.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    sys.setswitchinterval(SWITCH_SECONDS)
    if options.parent_pid is not None:
        report_to_driver()
        threading.Thread(target=follow_parent, args=(options.parent_pid,), daemon=True).start()
    settings = check(options)
    with bind(settings.host, settings.port) as listener:
        print(f"loading {', '.join(one.scorer for one in settings.scorers)}", flush=True)
        with loaded_models(settings) as models:
            run(serve(settings, models, listener))


async def serve(settings: ServerSettings, models: Mapping[str, Model], listener: socket.socket) -> None:
    """Test the scorers, serve until SIGTERM or Ctrl-C, drain. ModelError when a model is lost for good."""
    metrics, readers = ServerMetrics(), Readers()
    doors = (*DOORS, FlowGrpoDoor()) if settings.accept_flow_grpo else DOORS
    counters = {name: metrics.of_scorer(name, *model.scorer.score_range) for name, model in models.items()}
    batchers = {
        name: Batcher(model.scorer, name, settings.batch, model.device, counters[name])
        for name, model in models.items()
    }
    devices = list(dict.fromkeys(model.device for model in models.values()))
    supervisors = supervisors_of(models.values())
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def check_and_listen() -> None:
        served, reproducible = [], not settings.batch.share_calls
        for name, model in models.items():
            prefix = f"/{name}" if len(models) > 1 else ""
            check_score = await _check(batchers[name], model.scorer)
            info = server_info(name, model.scorer, reproducible)
            served.append(Served(prefix, info, batchers[name], counters[name], check_score, model.scorer.limits))
        for supervisor in supervisors:
            _watch(supervisor, metrics, [counters[name] for name in supervisor.names], lost)
        app = ServerApp(served, settings.limits, settings.queue_bytes, devices, metrics, readers, doors, supervisors)
        opening = open_for_requests(settings, listener.getsockname()[1], served)
        await serve_http(app, listener, Connections(ConnectionLimits()), opening)

    feeding = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
    done, _ = await asyncio.wait(
        {*feeding, asyncio.create_task(check_and_listen()), lost}, return_when=asyncio.FIRST_COMPLETED
    )
    # If a batcher ends first, stop the server: it could not answer any more.
    for task in done:
        task.result()
    if any(device.busy for device in devices) or readers.busy:
        # A model call or a reader outlived every request it was made for. The interpreter would wait for its thread.
        stop(supervisors)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    for task in feeding:
        task.cancel()
    for device in devices:
        device.close()
    readers.close()


def _watch(
    supervisor: Supervisor, metrics: ServerMetrics, counters: Sequence[ScorerMetrics], lost: asyncio.Future[None]
) -> None:
    """Report a model process and its restarts; the error of one that cannot be restarted becomes that of `lost`."""
    loop = lost.get_loop()

    def end(error: ModelError) -> None:
        if not lost.done():
            lost.set_exception(error)

    def failed(error: ModelError) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(end, error)

    def restarted() -> None:
        for counter in counters:
            counter.restarted()

    metrics.watch_process(supervisor.names, lambda: supervisor.pid)
    supervisor.watch(restarted, failed)


@asynccontextmanager
async def open_for_requests(settings: ServerSettings, port: int, served: Sequence[Served]) -> AsyncIterator[None]:
    """Context that lasts while requests are taken: entered when every scorer is ready, left when the drain begins."""
    if settings.ready_file is not None:
        write_whole(settings.ready_file, json.dumps({"port": port, "pid": os.getpid()}).encode())
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base = settings.advertise_url or f"http://{host}:{port}"
    addresses = {one.info.scorer: base + one.prefix for one in served}
    async with registered(settings.redis_url, addresses, settings.limits.token):
        for name, url in addresses.items():
            print(f"{name} is ready at {url}", flush=True)
        yield


def server_info(name: str, scorer: Scorer, reproducible: bool) -> ServerInfo:
    """The identity that a scorer declares under its served name."""
    low, high = scorer.score_range
    return ServerInfo(
        scorer=name,
        version=scorer.version,
        weights_hash=scorer.weights_hash,
        differentiable=scorer.differentiable,
        low=low,
        high=high,
        preprocess_version=scorer.preprocess_version,
        implementation=scorer.implementation(),
        reproducible=reproducible,
        precision=str(scorer.precision),
    )


async def _check(batcher: Batcher, scorer: Scorer) -> float:
    """Score the test image through the batcher, as for a client; ModelError unless the score is finite."""
    request = scorer.check_request()
    try:
        answer = await batcher.submit(request)
        if scorer.differentiable:
            pixels_BCHW = np.ascontiguousarray(request.images_BHWC.transpose(0, 3, 1, 2), dtype=np.float32)
            pixels_BCHW /= np.float32(255)
            await batcher.submit(GradientRequest(pixels_BCHW, request.prompts, request.metadata))
    except RewardError as error:
        raise ModelError(f"the scorer {scorer.name} failed its start-up check ({error.cause}): {error}") from error
    return float(answer.scores_B[0])
