"""What a server process does about its port, its signals, its parent and its files."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from common.errors import ConfigError
from reward_servers.connection import BoundedConnection

# After the last deadline, for answers to be sent.
DRAIN_EXTRA_SECONDS = 1
# Of an orphan, whose launcher is gone: nobody is left to wait for its answers.
ORPHAN_SECONDS = 30
# Enough for hundreds of workers, and safely below the 1024 open files that a shell allows.
MAX_CONNECTIONS = 512
# Longer than a client keeps an idle connection, so that the client is the one to close it.
KEEP_ALIVE_SECONDS = 75
PARENT_POLL_SECONDS = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Take the address at once, so that a taken port is known before minutes of loading."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. asyncio sets it only on sockets that name their protocol; without it the body of an answer
    # waits for the client's acknowledgement of the head, which a client delays by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _port_error(host, port, error) from error
    return listener


async def serve_http(
    app: Starlette, listener: socket.socket, while_open: AbstractAsyncContextManager[None], deadline_s: float
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then drain: every request taken is answered within its `deadline_s`.

    `while_open` is entered once the port is open, and left at the beginning of the drain.
    """
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        limit_concurrency=MAX_CONNECTIONS,
        # A warning for each connection beyond the limit would be a second flood.
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(deadline_s) + DRAIN_EXTRA_SECONDS,
    )
    # uvicorn drains on these, then raises the signal again; a drained stop is a success, not a death.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore_signal)
    try:
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _port_error(host, port, error) from error
    await _Server(config, while_open).serve(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, while_open: AbstractAsyncContextManager[None]) -> None:
        super().__init__(config)
        self._while_open = while_open
        self._open = AsyncExitStack()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._open.enter_async_context(self._while_open)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._open.aclose()
        await super().shutdown(sockets)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def follow_parent(parent_pid: int) -> None:
    """End with the launcher, also when it was killed and could stop nobody: an orphan is given another parent."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _port_error(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host} port {port}: {error}; choose another --port or --host, or stop what holds it"
    )


def _ignore_signal(number: int, frame: object) -> None:
    """Stands in for the default handler while uvicorn handles signals itself."""
