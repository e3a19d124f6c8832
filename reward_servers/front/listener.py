"""Accepts connections, and ends: answers what was accepted, and closes all that is left after a few seconds."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from reward_servers.front.connection import Connection
from reward_servers.front.connections import Connections
from reward_servers.front.exchange import Service

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
DRAIN_SECONDS = 4.0
"""After a stop signal, accepted requests have this long to be answered; the client asks another server the rest."""
LEAVE_SECONDS = 1.0
"""New connections are accepted until `while_open` has been left, for at most this long: a registry may not answer."""
END_SECONDS = 5
"""The kernel ends a process this long after its stop signal, whatever runs in it."""
ACCEPTED_AT_ONCE = 16
"""Connections accepted before other work has its turn: a flood of them must not delay requests."""
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
RETRY_SECONDS = 0.1

logger = logging.getLogger(__name__)


async def serve(
    service: Service, listener: socket.socket, table: Connections, while_open: AbstractAsyncContextManager[None]
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then drain. A second signal ends the drain.

    `while_open` is entered once the port is open, and left when the drain begins.
    """
    listener.setblocking(False)
    signals = _Signals()
    accepting = asyncio.create_task(accept(service, listener, table))
    sweeping = asyncio.create_task(table.sweep())
    stack = AsyncExitStack()
    await stack.enter_async_context(while_open)
    try:
        await signals.stop.wait()
    finally:
        until = asyncio.get_running_loop().time() + DRAIN_SECONDS
        leaving = asyncio.create_task(stack.aclose())
        await asyncio.wait({leaving}, timeout=LEAVE_SECONDS)
        accepting.cancel()
        listener.close()
        await drain(table, signals.hurry, until)
        await leaving
        sweeping.cancel()


async def accept(service: Service, listener: socket.socket, table: Connections) -> None:
    """Accept connections until cancelled."""
    loop = asyncio.get_running_loop()
    opening: set[asyncio.Task[object]] = set()
    count = 0
    while True:
        await table.room()
        try:
            accepted, _ = await loop.sock_accept(listener)
        except OSError as error:
            if error.errno not in OUT_OF_FILES:
                continue  # the client was gone before it was accepted
            logger.warning("no connection can be accepted: %s; allow more open files (ulimit -n)", error.strerror)
            await asyncio.sleep(RETRY_SECONDS)
            continue
        task: asyncio.Task[object] = loop.create_task(
            loop.connect_accepted_socket(lambda: Connection(service, table), accepted)
        )
        opening.add(task)
        task.add_done_callback(opening.discard)
        count += 1
        if count % ACCEPTED_AT_ONCE == 0:
            await asyncio.gather(*opening, return_exceptions=True)


async def drain(table: Connections, hurry: asyncio.Event, until: float) -> None:
    """Close idle connections, let the others be answered, and end what is left at `until` or a `hurry`."""
    left_s = until - asyncio.get_running_loop().time()
    for member in table.each():
        member.drain()
    quiet, hurried = asyncio.create_task(table.quiet()), asyncio.create_task(hurry.wait())
    await asyncio.wait({quiet, hurried}, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
    for task in (quiet, hurried):
        task.cancel()
    for member in table.each():
        member.abort()
    # Each connection withdraws its requests in its next turn.
    await asyncio.sleep(0)


class _Signals:
    """The first stop signal sets `stop` and bounds the rest of the process, the second one sets `hurry`."""

    def __init__(self) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            signal.signal(number, self._caught)

    def _caught(self, number: int, frame: object) -> None:  # noqa: ARG002
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._noted)

    def _noted(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
            return
        self.stop.set()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, END_SECONDS)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: its reads and writes take half the time. None for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
