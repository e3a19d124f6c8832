"""One model process as its server sees it: started, asked, and ended."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

from common.project_files import python_command, python_environment
from common.wire import AnyArray
from reward_servers.model_process.channel import Channel, Message
from reward_servers.model_process.errors import raise_described
from reward_servers.model_process.lifetime import stop_signals_blocked

MODULE = "reward_servers.model_process"
WITHHELD_VARIABLES = ("REWARD_SERVER_TOKEN", "RTDMD_DASHBOARD_TOKEN", "REDIS_USERNAME", "REDIS_PASSWORD")
"""Secrets of the server and of the run, which no model needs."""
SETTLE_SECONDS = 5.0
"""A process that has closed its socket has this long to end."""

Replied = tuple[dict[str, Any], list[AnyArray]]


class ModelProcess:
    """One process, from its start to its end. Its standard output and error are those of the server.

    The kernel ends it with the thread that started it (`end_with`): start it in one that lives as long as the server.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        environment = {name: value for name, value in python_environment().items() if name not in WITHHELD_VARIABLES}
        with theirs, stop_signals_blocked():
            self._process = subprocess.Popen(
                [*python_command(MODULE), str(theirs.fileno()), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: Message, arrays: Sequence[AnyArray] = (), until: float = math.inf) -> Replied:
        """A call and its reply: `send`, then `reply`."""
        self.send(message, arrays, until)
        return self.reply(until)

    def send(self, message: Message, arrays: Sequence[AnyArray] = (), until: float = math.inf) -> None:
        """Send a call; raises as `Channel.send`."""
        self._channel.send(message, arrays, until)

    def reply(self, until: float = math.inf) -> Replied:
        """The reply to the last call. Raises as `Channel.receive`, or the error that the reply describes."""
        message, arrays = self._channel.receive(until)
        raise_described(message)
        return message, arrays

    def wait(self) -> None:
        """Return when it has ended."""
        self._process.wait()

    def ending(self) -> str:
        """The way it ended, after it closed its socket, as the end of a sentence."""
        try:
            status = self._process.wait(SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        if status >= 0:
            return f"ended with exit status {status}"
        number = signal.Signals(-status)
        return f"was ended by {number.name}{' (out of memory?)' if number == signal.SIGKILL else ''}"

    def close(self) -> None:
        """Let it end after its present call."""
        self._channel.shut()

    def kill(self) -> None:
        self._process.kill()

    def end(self, grace_s: float = 0.0) -> None:
        """Let it end within so many seconds, then kill it; return when it is gone."""
        self.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._channel.close()
