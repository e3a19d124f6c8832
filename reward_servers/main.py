"""Start one reward server: read the command line, load the scorer, probe it, serve until told to stop.

The scorer's stack (torch, transformers, ...) is imported here by name only, so that a server without torch stays one.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI

from common.errors import ConfigError, ModelError, RewardError, RtdmdError
from common.reward_api import GradientRequest, ScoreRequest, ServerInfo
from reward_servers.app import AppLimits, RewardService
from reward_servers.batcher import Batcher, BatchLimits
from reward_servers.metrics import ServerMetrics
from reward_servers.scorers.base import Scorer

BUILT_IN_SCORERS = {
    "hps": "reward_servers.scorers.hps:HpsScorer",
    "pickscore": "reward_servers.scorers.pickscore:PickScoreScorer",
    "vlm_judge": "reward_servers.scorers.vlm_judge:VlmJudgeScorer",
}
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"
PROBE_SIDE = 64
PARENT_POLL_SECONDS = 0.5
DRAIN_SECONDS = 30
# Longer than a client keeps an idle connection, so that the client is the one to close it.
KEEP_ALIVE_SECONDS = 75
USAGE_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class ServerSettings:
    """The command line, checked."""

    scorer: str
    name: str | None
    model: Path | None
    host: str
    port: int
    device: str
    batch: BatchLimits
    app: AppLimits
    ready_file: Path | None


def main(arguments: list[str] | None = None) -> int:
    """Serve; 0 after a drained stop, 2 with one line on stderr when the server cannot start."""
    options = build_parser().parse_args(arguments)
    # Set before the scorer's stack is imported: OpenMP and MKL read it once, for every thread of the process.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    if options.parent_pid is not None:
        threading.Thread(target=_follow_parent, args=(options.parent_pid,), daemon=True).start()
    try:
        settings = _check(options)
        with _bind(settings.host, settings.port) as listener:
            asyncio.run(serve(settings, _load_scorer(settings), listener))
    except RtdmdError as error:
        print(f"reward_servers: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reward_servers",
        description="Serve one reward over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scorer", required=True, help="hps, pickscore, or package.module:Class of your own")
    parser.add_argument("--model", type=Path, help="the scorer's model directory")
    parser.add_argument("--name", help="name in answers and metrics; the scorer's own when left out")
    parser.add_argument("--host", default="127.0.0.1", help=f"any other than loopback needs {TOKEN_VARIABLE} set")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one; see --ready-file")
    parser.add_argument("--device", default="cpu", help="torch device of the model")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads of the model")
    parser.add_argument("--max-batch", type=_positive, default=16, help="images per model call")
    parser.add_argument(
        "--reproducible", action="store_true", help="no two requests share a model call: slower, equal to the last bit"
    )
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="how long a request waits for company")
    parser.add_argument("--queue-items", type=_positive, default=256, help="images that may wait; then 429")
    parser.add_argument("--max-body-mb", type=_positive, default=256, help="request body limit in MiB; then 413")
    parser.add_argument("--deadline-s", type=float, default=60.0, help="seconds a request may take; then 504")
    parser.add_argument("--ready-file", type=Path, help="written once ready: JSON with port and pid")
    parser.add_argument("--parent-pid", type=int, help="stop when this process is no longer the parent")
    return parser


async def serve(settings: ServerSettings, scorer: Scorer, listener: socket.socket) -> None:
    """Probe the scorer, serve until SIGTERM or Ctrl-C, drain."""
    name = settings.name or scorer.name
    low, high = scorer.score_range
    info = ServerInfo(
        name, scorer.version, scorer.weights_hash, scorer.differentiable, low, high, scorer.preprocess_version
    )
    metrics = ServerMetrics(name, low, high)
    batcher = Batcher(scorer, name, settings.batch, metrics)

    async def probe_and_listen() -> None:
        probe_score = await _probe(batcher, scorer)
        service = RewardService(batcher, info, metrics, settings.app, probe_score)
        await _listen(service.build_app(), listener, settings.ready_file)

    feeding = asyncio.create_task(batcher.run())
    serving = asyncio.create_task(probe_and_listen())
    await asyncio.wait({feeding, serving}, return_when=asyncio.FIRST_COMPLETED)
    # Should the batcher ever end first, the server ends with it rather than answer nothing.
    for task in (feeding, serving):
        if task.done():
            task.result()
    if batcher.busy:
        # A model call outlived the drain; the interpreter would wait for its thread for ever.
        os._exit(1)
    feeding.cancel()
    batcher.close()


async def _listen(app: FastAPI, listener: socket.socket, ready_file: Path | None) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    # uvicorn drains on these, then raises the signal again; a drained stop is a success, not a death.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore_signal)
    try:
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _port_error(host, port, error) from error
    if ready_file is not None:
        _write_atomically(ready_file, json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}))
    await server.serve(sockets=[listener])


async def _probe(batcher: Batcher, scorer: Scorer) -> float:
    """Score one plain picture the way a client would; ModelError when that does not give a finite score."""
    prompts, metadata = [scorer.probe_prompt], [dict(scorer.probe_metadata)]
    images_BHWC = np.full((1, PROBE_SIDE, PROBE_SIDE, 3), 128, dtype=np.uint8)
    try:
        answer = await batcher.submit(ScoreRequest(images_BHWC, prompts, metadata))
        if scorer.differentiable:
            pixels_BCHW = np.full((1, 3, PROBE_SIDE, PROBE_SIDE), 0.5, dtype=np.float32)
            await batcher.submit(GradientRequest(pixels_BCHW, prompts, metadata))
    except RewardError as error:
        raise ModelError(f"the scorer {scorer.name} failed its probe ({error.cause}): {error}") from error
    return float(answer.scores_B[0])


def _load_scorer(settings: ServerSettings) -> Scorer:
    if settings.model is not None and not settings.model.is_dir():
        raise ModelError(f"--model {settings.model} is not a directory")
    return _scorer_class(settings.scorer).load(settings.model, settings.device)


def _scorer_class(spec: str) -> type[Scorer]:
    path = BUILT_IN_SCORERS.get(spec, spec)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        known = ", ".join(BUILT_IN_SCORERS)
        raise ConfigError(f"--scorer {spec}: neither one of {known} nor an import path package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = vars(importlib.import_module(module_name)).get(class_name)
    except ImportError as error:
        raise ConfigError(f"--scorer {spec}: {error} (looked in the current directory as well)") from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ConfigError(f"--scorer {spec}: {module_name} has no subclass of Scorer named {class_name}")
    return found


def _check(options: argparse.Namespace) -> ServerSettings:
    token = os.environ.get(TOKEN_VARIABLE) or None
    if not _is_loopback(options.host) and token is None:
        message = f"--host {options.host} is reachable from outside: set {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        raise ConfigError(message)
    return ServerSettings(
        scorer=options.scorer,
        name=options.name,
        model=options.model,
        host=options.host,
        port=options.port,
        device=options.device,
        batch=BatchLimits(options.max_batch, options.max_wait_ms / 1000, options.queue_items, not options.reproducible),
        app=AppLimits(options.max_body_mb * 2**20, options.deadline_s, token),
        ready_file=options.ready_file,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    """Take the address at once, so that a taken port is known before minutes of loading."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _port_error(host, port, error) from error
    return listener


def _port_error(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --port or stop what holds it")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _follow_parent(parent_pid: int) -> None:
    """End with the launcher, also when it was killed and could stop nobody: an orphan is given another parent."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(DRAIN_SECONDS)
    os._exit(1)


def _ignore_signal(number: int, frame: object) -> None:
    """Stands in for the default handler while uvicorn handles signals itself."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
