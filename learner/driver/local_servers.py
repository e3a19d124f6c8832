"""Reward servers whose url is `local`: started with the run, on loopback, and stopped with it.

    specs ─► a process each (one for a GPU) ─► ready file (port) ─► urls ─► ... ─► SIGTERM, drain, SIGKILL
                                                                      died ─► the same again, at the same port

While one starts again, its reward is out, and the outage policy says what happens. A client refuses a server whose
identity has changed. Every exit from the `with` block stops them. A launcher that is killed cannot stop them, so each
server also watches its parent process and ends by itself (`--parent-pid`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from common.config.rewards import RewardConfig
from common.errors import RewardUnavailable
from common.process_log import Repeats, reported
from common.project_files import python_command, python_environment
from common.types import Precision

POLL_SECONDS = 0.05
STOP_SECONDS = 10.0
LOG_LINES_QUOTED = 5
RESTARTS, WINDOW_S = 3, 600.0
"""A server is started again so many times within so many seconds."""


@dataclass(frozen=True)
class LocalServerSpec:
    """One server to start. Most fields are options of `python -m reward_servers`, explained there.

    Attributes:
        beside: further rewards that the same process serves, with this one's device, threads and max_batch.
    """

    name: str
    scorer: str
    model: Path | None
    threads: int = 1
    max_batch: int = 16
    device: str = "cpu"
    precision: Precision | None = None
    beside: tuple[LocalServerSpec, ...] = ()

    @property
    def rewards(self) -> tuple[LocalServerSpec, ...]:
        return (self, *self.beside)

    def urls(self, base: str) -> dict[str, str]:
        """The URL of each reward, by name. Several scorers of a process have theirs under the base."""
        return {one.name: f"{base}/{one.name}" if self.beside else base for one in self.rewards}


def shared(specs: Sequence[LocalServerSpec]) -> list[LocalServerSpec]:
    """The servers to start: rewards on one GPU with the same max_batch share a process. On CPUs each has one."""
    groups: dict[object, list[LocalServerSpec]] = {}
    for spec in specs:
        gpu = "cuda:0" if spec.device == "cuda" else spec.device
        groups.setdefault(spec.name if gpu == "cpu" else (gpu, spec.max_batch), []).append(spec)
    return [
        replace(first, beside=tuple(others), threads=max(one.threads for one in (first, *others)))
        for first, *others in groups.values()
    ]


class LocalServers:
    """Context manager: inside it every server in `specs` has scored its test image and answers at `urls[name]`.

    Args:
        specs: the rewards, with unique names.
        log_dir: gets `reward_NAME.log` of each server, with the name of its first reward; created when missing.
        ready_timeout_s: seconds in which all of them together must load and score their test images.
        say: is told of servers that are started again.
        restarted: gets the name of each reward whose server is started again.
    """

    def __init__(
        self,
        specs: Sequence[LocalServerSpec],
        log_dir: Path,
        ready_timeout_s: float = 300.0,
        say: Callable[[str], None] = lambda _: None,
        restarted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.urls: dict[str, str] = {}
        self._say, self._restarted = say, restarted
        self._lock = Lock()
        self._specs = tuple(shared(specs))
        self._deaths: dict[str, deque[float]] = {spec.name: deque() for spec in self._specs}
        self._log_dir = log_dir
        self._read: Counter[str] = Counter()  # bytes of each log that were read
        self._repeats = Repeats()
        self._ready_timeout_s = ready_timeout_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        """Start all and wait for all; RewardUnavailable quotes the log of the first that fails to start."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            for spec in self._specs:
                self._processes[spec.name] = self._start(spec, port=0)
            deadline = time.monotonic() + self._ready_timeout_s
            for spec in self._specs:
                self.urls |= spec.urls(self._wait_until_ready(spec.name, deadline))
        except BaseException:  # includes Ctrl-C: the servers must be stopped in any case
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def check(self) -> None:
        """RewardUnavailable when a server has died."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise self._failure(name, "died", f"ended with exit status {process.returncode}")

    def keep_up(self, needed: Container[str] | None = None) -> None:
        """Start servers again that have died. May be called from several threads.

        Raises:
            RewardUnavailable: a server (of those named) has died more often than it is started again.
        """
        with self._lock:
            for spec in self._specs:
                self._tell_warnings(spec.name)
                process = self._processes.get(spec.name)
                if process is not None and process.poll() is not None:
                    required = needed is None or any(one.name in needed for one in spec.rewards)
                    self._revive(spec, process.returncode, required=required)

    def _tell_warnings(self, name: str) -> None:
        """Say what the server has written about itself since the last call."""
        with suppress(OSError), self._log_file(name).open("rb") as log:
            log.seek(self._read[name])
            for line in log:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._read[name] += len(line)
                warning = reported(line.decode(errors="replace"))
                if warning is not None and self._repeats.is_new(warning[1]):
                    self._say(f"the local reward server {name}: {warning[1]}")

    def _revive(self, spec: LocalServerSpec, status: int, *, required: bool) -> None:
        deaths, now = self._deaths[spec.name], time.monotonic()
        while deaths and now - deaths[0] > WINDOW_S:
            deaths.popleft()
        if len(deaths) < RESTARTS:
            deaths.append(now)
            self._say(f"the local reward server {spec.name} ended with exit status {status}: it is started again")
            for one in spec.rewards:
                self._restarted(one.name)
            self._processes[spec.name] = self._start(spec, port=urlsplit(self.urls[spec.name]).port or 0)
        elif required:
            what = f"ended with exit status {status}, for the {RESTARTS + 1}th time in {WINDOW_S / 60:.0f} minutes"
            raise self._failure(spec.name, "died", what)

    def _start(self, spec: LocalServerSpec, port: int) -> subprocess.Popen[bytes]:
        self._ready_file(spec.name).unlink(missing_ok=True)
        command = [
            *(*python_command("reward_servers"), *chain.from_iterable(map(_scorer_options, spec.rewards))),
            *("--threads", str(spec.threads), "--max-batch", str(spec.max_batch), "--device", spec.device),
            "--reproducible",
            *("--port", str(port), "--ready-file", str(self._ready_file(spec.name)), "--parent-pid", str(os.getpid())),
        ]
        # The servers keep our working directory, so that a custom scorer is found as it is for the run.
        with self._log_file(spec.name).open("wb" if port == 0 else "ab") as log:
            return subprocess.Popen(
                command,
                env=python_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: Ctrl-C reaches only this process, which then lets the servers drain.
                start_new_session=True,
            )

    def _wait_until_ready(self, name: str, deadline: float) -> str:
        ready_file = self._ready_file(name)
        while not ready_file.is_file():
            if self._processes[name].poll() is not None:
                raise self._failure(name, "start", "did not start")
            if time.monotonic() > deadline:
                raise self._failure(name, "start", f"was not ready within {self._ready_timeout_s:g} s")
            time.sleep(POLL_SECONDS)
        port = json.loads(ready_file.read_text(encoding="utf-8"))["port"]
        return f"http://127.0.0.1:{port}"

    def _failure(self, name: str, cause: str, what: str) -> RewardUnavailable:
        log = self._log_file(next(spec.name for spec in self._specs if name in {one.name for one in spec.rewards}))
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_QUOTED:]
        quoted = "\n".join(f"    {line}" for line in lines) or "    (empty)"
        return RewardUnavailable(name, cause, f"the local reward server {name} {what}; the end of {log}:\n{quoted}")

    def _stop(self) -> None:
        """Let all servers drain, wait, then kill what is left, including their child processes."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
        self.urls.clear()

    def _ready_file(self, name: str) -> Path:
        return self._log_dir / f"reward_{name}.ready"

    def _log_file(self, name: str) -> Path:
        return self._log_dir / f"reward_{name}.log"


def _scorer_options(spec: LocalServerSpec) -> list[str]:
    model = [] if spec.model is None else ["--model", str(spec.model)]
    precision = [] if spec.precision is None else ["--precision", str(spec.precision)]
    return ["--scorer", spec.scorer, "--name", spec.name, *model, *precision]


def local_specs(rewards: Sequence[RewardConfig]) -> list[LocalServerSpec]:
    """The local servers of a run file's rewards."""
    return [
        LocalServerSpec(one.name, one.scorer, one.model, one.threads, one.max_batch, one.device, one.precision)
        for one in rewards
        if one.url == "local" and one.scorer is not None
    ]
