"""Process-level parts of a server: port, signals, parent process and files."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from common.errors import ConfigError
from reward_servers.front.connections import Connections
from reward_servers.front.exchange import Service
from reward_servers.front.listener import STOP_SIGNALS, loop_factory, serve

ORPHAN_SECONDS = 10
"""An orphan that has not ended so long after its stop signal is killed by its own watcher."""
PARENT_POLL_SECONDS = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Bind the address at once, so that a taken port is reported before minutes of loading."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit this option. asyncio sets it only on sockets that name their protocol. Without it the body of
    # a response waits for the client's acknowledgement of the head, which a client delays by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _port_error(host, port, error) from error
    return listener


async def serve_http(
    service: Service, listener: socket.socket, table: Connections, while_open: AbstractAsyncContextManager[None]
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then drain (`reward_servers.front.listener`)."""
    try:
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _port_error(host, port, error) from error
    await serve(service, listener, table, while_open)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` in an event loop, uvloop's where it is installed. The process ends after it."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main)
        # Python gives handlers of its own back to the system while it ends: a second signal would make a failure of it.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


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
