"""Process-level parts of a server: port, signals, parent process and files."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import uvicorn
from starlette.applications import Starlette

from common.errors import ConfigError
from reward_servers.connection import BoundedConnection

DRAIN_EXTRA_SECONDS = 1
"""After the last deadline the drain waits this long for responses to be sent."""
ORPHAN_SECONDS = 30
"""An orphan drains for at most this long: its launcher is gone, so its responses are no longer needed."""
MAX_CONNECTIONS = 512
"""This is enough for hundreds of workers and safely below the 1024 open files that a shell allows."""
KEEP_ALIVE_SECONDS = 75
"""Idle connections are kept longer than clients keep them, so that the client is the one to close them."""
PARENT_POLL_SECONDS = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Bind the address at once, so that a taken port is reported before minutes of loading."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit this option. asyncio sets it only on sockets that name their protocol. Without it the body of
    # a
    # response waits for the client's acknowledgement of the head, which a client delays by 40 ms.
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
    """Answer requests until SIGTERM or Ctrl-C, then drain: every accepted request is answered within its `deadline_s`.

    `while_open` is entered once the port is open, and left when the drain begins.
    """
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        limit_concurrency=MAX_CONNECTIONS,
        # At a flood of connections, a warning for each one beyond the limit would flood the log.
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(deadline_s) + DRAIN_EXTRA_SECONDS,
    )
    # uvicorn drains on these signals and then raises them again; a drained stop is a success, not a crash.
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


def follow_parent(parent_pid: int) -> None:
    """Stop when the launcher is gone, even if it was killed: an orphan then has another parent."""
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
    """Replaces the default handler while uvicorn handles signals itself."""
