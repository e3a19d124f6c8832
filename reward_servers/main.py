"""Start a reward server: read the command line, load the scorers, test them, serve until stopped.

    options ─► port bound ─► scorers loaded ─► a batcher each, one device ─► tests ─► open ─► ... ─► SIGTERM, drain

The scorers' libraries (torch, transformers, ...) are imported by name here, so a server without torch never loads it.
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
from pathlib import Path

import numpy as np

from common.command import exit_status
from common.errors import ConfigError, ModelError, RewardError
from common.project_files import import_own
from common.rewards.api import GradientRequest, ServerInfo
from common.whole_files import write_whole
from reward_servers.app import ServerApp
from reward_servers.batcher import Batcher, Device
from reward_servers.doors import DOORS, FlowGrpoDoor
from reward_servers.front.connections import ConnectionLimits, Connections
from reward_servers.limits import Readers
from reward_servers.metrics import ServerMetrics
from reward_servers.options import USAGE_ERROR, ScorerSettings, ServerSettings, build_parser, check, check_names
from reward_servers.process import bind, follow_parent, run, serve_http
from reward_servers.registration import registered
from reward_servers.scorers import BUILT_IN_SCORERS, MOVED_SCORERS
from reward_servers.scorers.base import Scorer
from reward_servers.scoring import Served

SWITCH_SECONDS = 0.0005
"""The event loop waits at most this long for a thread that computes in Python, a reader or a scorer.

Python's default of 5 ms, which a request may meet several times, is longer than all other costs of serving.
"""
HUB_PARTS = 2
"""A name of the Hugging Face hub is organisation/name."""
REASON_CHARACTERS = 300
"""A library's message is cut to this many characters in ours."""


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
        threading.Thread(target=follow_parent, args=(options.parent_pid,), daemon=True).start()
    settings = check(options)
    with bind(settings.host, settings.port) as listener:
        print(f"loading {', '.join(one.scorer for one in settings.scorers)}", flush=True)
        run(serve(settings, load_scorers(settings), listener))


def load_scorers(settings: ServerSettings) -> dict[str, Scorer]:
    """Load the scorers, by served name. Everything that can be checked before loading is checked first."""
    kinds = [_scorer_class(one.scorer) for one in settings.scorers]
    names = [one.name or kind.name for one, kind in zip(settings.scorers, kinds, strict=True)]
    check_names(names)
    for one in settings.scorers:
        if one.model is not None and not one.model.is_dir():
            raise ModelError(f"--model {one.model} is not a directory{remedy(one.model)}")
    loading = zip(names, kinds, settings.scorers, strict=True)
    return {name: _load(kind, one, settings.device) for name, kind, one in loading}


def remedy(model: Path) -> str:
    """The end of an error: how to get a model directory from the file that was named."""
    if not model.is_absolute() and len(model.parts) == HUB_PARTS and not model.parent.exists():
        return (
            f": if this is a name of the Hugging Face hub, run `hf download {model} --local-dir DIR` (docs/rewards.md)"
        )
    if not model.is_file():
        return ""
    return (
        ", but a file: name the folder that it is in, or make a model directory from a published checkpoint with "
        "`python -m reward_servers.convert` (docs/rewards.md)"
    )


async def serve(settings: ServerSettings, scorers: Mapping[str, Scorer], listener: socket.socket) -> None:
    """Test the scorers, serve until SIGTERM or Ctrl-C, drain."""
    metrics, device, readers = ServerMetrics(), Device(), Readers()
    doors = (*DOORS, FlowGrpoDoor()) if settings.accept_flow_grpo else DOORS
    counters = {name: metrics.of_scorer(name, *scorer.score_range) for name, scorer in scorers.items()}
    batchers = {name: Batcher(scorer, name, settings.batch, device, counters[name]) for name, scorer in scorers.items()}

    async def check_and_listen() -> None:
        served, reproducible = [], not settings.batch.share_calls
        for name, scorer in scorers.items():
            prefix = f"/{name}" if len(scorers) > 1 else ""
            check_score = await _check(batchers[name], scorer)
            info = server_info(name, scorer, reproducible)
            served.append(Served(prefix, info, batchers[name], counters[name], check_score, scorer.limits))
        app = ServerApp(served, settings.limits, settings.queue_bytes, device, metrics, readers, doors)
        opening = open_for_requests(settings, listener.getsockname()[1], served)
        await serve_http(app, listener, Connections(ConnectionLimits()), opening)

    feeding = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
    done, _ = await asyncio.wait(
        {*feeding, asyncio.create_task(check_and_listen())}, return_when=asyncio.FIRST_COMPLETED
    )
    # If a batcher ends first, stop the server: it could not answer any more.
    for task in done:
        task.result()
    if device.busy or readers.busy:
        # A model call or a reader outlived every request it was made for. The interpreter would wait for its thread.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    for task in feeding:
        task.cancel()
    device.close()
    readers.close()


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
        implementation=_implementation(type(scorer)),
        reproducible=reproducible,
    )


def _implementation(kind: type[Scorer]) -> str:
    """The class path that identifies a scorer; a moved class keeps its first one."""
    present = f"{kind.__module__}:{kind.__qualname__}"
    return next((first for first, path in MOVED_SCORERS.items() if path == present), present)


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


def _scorer_class(spec: str) -> type[Scorer]:
    path = MOVED_SCORERS.get(spec) or BUILT_IN_SCORERS.get(spec, spec)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        known = ", ".join(BUILT_IN_SCORERS)
        raise ConfigError(f"--scorer {spec}: neither one of {known} nor an import path package.module:Class")
    try:
        found = vars(import_own(module_name)).get(class_name)
    except ImportError as error:
        raise _missing(spec, error) from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ConfigError(f"--scorer {spec}: {module_name} has no subclass of Scorer named {class_name}")
    return found


def _load(kind: type[Scorer], one: ScorerSettings, device: str) -> Scorer:
    try:
        return kind.load(one.model, device)
    except ImportError as error:  # some libraries import others only when a model is built
        raise _missing(one.scorer, error) from error


def _missing(spec: str, error: ImportError) -> ConfigError:
    """Some libraries report a missing package on a whole screen. This puts it on one line, with the install command."""
    reason = " ".join(str(error).split())
    if spec in BUILT_IN_SCORERS:
        extra = spec.removesuffix("_parts")
        return ConfigError(f"--scorer {spec}: {reason[:REASON_CHARACTERS]}; pip install -e '.[{extra}]'")
    return ConfigError(f"--scorer {spec}: {reason[:REASON_CHARACTERS]} (looked in the current directory as well)")
