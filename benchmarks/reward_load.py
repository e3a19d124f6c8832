"""Load on a reward server from one light process: prepared bytes over raw sockets, so that the server is measured.

Closed loop: a fixed number of connections, each asks again as soon as it is answered. Open loop: requests arrive at
random times of a given rate whether or not the server keeps up, and wait times count from the arrival.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.project_files import PROJECT_ROOT, python_command, python_environment
from common.rewards.api import MEDIA_TYPE, METRICS_PATH, SCORE_PATH, ScoreRequest

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs without the proxies of the environment."""
TOKEN = "benchmark"
START_SECONDS = 300
STOP_SECONDS = 60
OK = 200
REFUSED = 429
TOO_MANY_CONNECTIONS = 503
READ_BYTES = 2**16


@dataclass(frozen=True)
class Target:
    """A running server, its model processes included."""

    port: int
    pid: int

    def metric(self, name: str) -> float:
        """Sum of a metric's samples over its labels."""
        with DIRECT.open(f"http://127.0.0.1:{self.port}{METRICS_PATH}") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def cpu_seconds(self) -> float:
        return sum(map(self.metric, ("process_cpu_seconds_total", "reward_server_model_process_cpu_seconds_total")))

    def resident_mib(self) -> float:
        names = ("process_resident_memory_bytes", "reward_server_model_process_resident_memory_bytes")
        return sum(map(self.metric, names)) / 2**20


@dataclass
class Outcome:
    """Seconds each answer took, by status, and how long the load lasted."""

    seconds: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, latency: float) -> None:
        self.latencies.setdefault(status, []).append(latency)

    def rate(self, status: int = OK) -> float:
        return len(self.latencies.get(status, ())) / self.seconds

    def milliseconds(self, percentile: float, status: int = OK) -> float | None:
        values = self.latencies.get(status)
        return round(float(np.percentile(values, percentile)) * 1000, 2) if values else None


@contextmanager
def serving(*options: str) -> Iterator[Target]:
    """A reward server with a token; stopped by a drain at the end."""
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder) / "ready.json"
        process = subprocess.Popen(
            [*python_command("reward_servers"), "--port", "0", "--ready-file", str(ready_file), *options],
            cwd=PROJECT_ROOT,
            env=python_environment() | {"REWARD_SERVER_TOKEN": TOKEN},
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ready_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: exit status {process.poll()}")
                time.sleep(0.05)
            yield Target(json.loads(ready_file.read_text())["port"], process.pid)
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def prepare(images: int, side: int, prefix: str = "") -> bytes:
    """One whole HTTP request for `images` random images of `side` x `side`."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    body = ScoreRequest(pixels, ["a red circle above a blue square"] * images).to_bytes()
    head = (
        f"POST {prefix}{SCORE_PATH} HTTP/1.1\r\nhost: benchmark\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def closed_loop(targets: Sequence[Target], requests: Sequence[bytes], connections: int, seconds: float) -> Outcome:
    """Keep `connections` busy; connection i sends requests[i mod their number] to targets[i mod theirs]."""

    async def ask_on(connection: Connection, request: bytes, until: float) -> None:
        while time.perf_counter() < until:
            started = time.perf_counter()
            outcome.add(await connection.ask(request), time.perf_counter() - started)

    async def run() -> None:
        opened = [await Connection.open(targets[index % len(targets)].port) for index in range(connections)]
        started = time.perf_counter()
        asking = [
            ask_on(connection, requests[index % len(requests)], started + seconds)
            for index, connection in enumerate(opened)
        ]
        await asyncio.gather(*asking)
        outcome.seconds = time.perf_counter() - started

    outcome = Outcome()
    asyncio.run(run())
    return outcome


def open_loop(target: Target, request: bytes, rate: float, seconds: float, seed: int = 0) -> Outcome:
    """Send at Poisson times of `rate` a second; a connection that is free, or else a new one, takes each."""
    draw = random.Random(seed)
    free: list[Connection] = []
    outcome = Outcome()

    async def ask_once(arrival: float) -> None:
        connection = free.pop() if free else await Connection.open(target.port)
        try:
            status = await connection.ask(request)
        except ConnectionError:
            # The server closed the connection without an answer; it is counted as the status of a server that is full.
            status = TOO_MANY_CONNECTIONS
        outcome.add(status, time.perf_counter() - arrival)
        if status == TOO_MANY_CONNECTIONS:
            connection.close()
        else:
            free.append(connection)

    async def run() -> None:
        started = arrival = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while arrival < started + seconds:
                arrival += draw.expovariate(rate)
                await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
                group.create_task(ask_once(arrival))
        outcome.seconds = time.perf_counter() - started

    asyncio.run(run())
    return outcome


class Connection:
    """One keep-alive connection; asks one thing at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    @classmethod
    async def open(cls, port: int) -> Connection:
        connected = socket.socket()
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connected, ("127.0.0.1", port))
        return cls(connected)

    def close(self) -> None:
        self._socket.close()

    async def ask(self, request: bytes) -> int:
        """Send, read the whole answer, return its status."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += await self._receive(loop)
        head, _, body = answer.partition(b"\r\n\r\n")
        left = _content_length(head) - len(body)
        while left > 0:
            left -= len(await self._receive(loop))
        return int(head.split(b" ", 2)[1])

    async def _receive(self, loop: asyncio.AbstractEventLoop) -> bytes:
        data = await loop.sock_recv(self._socket, READ_BYTES)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data


def _content_length(head: bytes) -> int:
    lines = (line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:])
    return next(int(value) for name, value in lines if name == b"content-length")
