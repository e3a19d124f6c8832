"""Live page of a run: reads the files of its directory, while it trains and afterwards.

    rtdmd train --dashboard [PORT]        the page of this run, while it trains
    rtdmd watch RUN_DIR [--port PORT]     the page of a run that trains elsewhere, or has finished

The page listens on loopback. On any other address it asks for the token in RTDMD_DASHBOARD_TOKEN; where that is set,
loopback asks for it too. Without a token the page answers only to names of this machine, so that a web page which has a
name of its own resolved to this machine reads nothing. It only reads: nothing on it changes a run.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.command import exit_status, user_path
from common.config.run import DASHBOARD_PORT, DashboardConfig
from common.console_stream import LOG
from common.errors import ConfigError
from common.rewards.bearer import bearer_token
from common.urls import host_fault, is_loopback
from learner.records.live_server import PageServer

DASHBOARD_TOKEN = "RTDMD_DASHBOARD_TOKEN"
"""Environment variable with the token of the page; its value is never written."""


@contextmanager
def live_page(run_dir: Path, host: str, port: int, option: str) -> Iterator[str]:
    """Serve the page of a run directory in a thread until the block ends; yield its URL.

    Args:
        port: 0 picks a free one.
        option: names host and port in errors, as `dashboard`.

    Raises:
        ConfigError: the host is not loopback and there is no token, or the port is taken or not permitted.
    """
    token = _token(host, option)
    try:
        server = PageServer(run_dir, host, port, token)
    except OSError as error:
        raise ConfigError(
            f"{option}.port = {port}: cannot listen on {host}:{port} ({error.strerror or error}): choose another, or 0 "
            "for any free one"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="live page", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


@contextmanager
def page_of_run(run_dir: Path, dashboard: DashboardConfig) -> Iterator[None]:
    """The page of a run that begins, if it asks for one; see `live_page`."""
    if dashboard.port is None:
        yield
        return
    with live_page(run_dir, dashboard.host, dashboard.port, "dashboard") as url:
        LOG.info(f"live page: {url}")
        yield


def _token(host: str, option: str) -> str | None:
    fault = host_fault(host)
    if fault:
        raise ConfigError(f"{option}.host = {host!r}: {fault}")
    token = bearer_token(os.environ.get(DASHBOARD_TOKEN), DASHBOARD_TOKEN, [host])
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"{option}.host = {host} is reachable from other machines: set {DASHBOARD_TOKEN}, such as to the output of "
            "`openssl rand -hex 16`, or listen on 127.0.0.1"
        )
    return token


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd watch RUN_DIR` until it is interrupted; exit status as in `common.command.exit_status`."""
    parser = argparse.ArgumentParser(
        prog="rtdmd watch",
        description="Show a run in the browser, while it trains or afterwards. It reads the run directory and changes "
        f"nothing. On other addresses than loopback the page asks for the token in {DASHBOARD_TOKEN}.",
    )
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="run directory, such as runs/NAME")
    parser.add_argument(
        "--port", type=int, default=DASHBOARD_PORT, metavar="PORT", help=f"default {DASHBOARD_PORT}; 0 is any free port"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _watch(arguments.run_dir, arguments.host, arguments.port))


def _watch(run_dir: Path, host: str, port: int) -> None:
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{run_dir}: not the directory of a run: it has neither config.yaml nor metrics.jsonl")
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port {port}: a port is from 0 to 65535")
    with live_page(run_dir, host, port, "watch") as url:
        print(f"live page of {run_dir}: {url}  (end with Ctrl-C)", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
