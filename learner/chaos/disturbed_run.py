"""A run as a user starts it, with its faults. It is watched through its files, and retried as a job is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import psutil

from common.errors import LearnerError
from common.project_files import PROJECT_ROOT
from learner.chaos.faults import inject
from learner.chaos.schedule import Fault, Injection, Target

POLL_S = 0.2
WARNING = " rtdmd WARNING "
GONE_S = 30.0
"""Seconds that the processes of a killed driver may take to go."""


@dataclass(frozen=True)
class Outcome:
    """The effect of an injection.

    Attributes:
        hit: whether there was a process to hit.
        noticed_s: seconds until the run's first warning; None without one. A driver's loss is noticed by its parent.
        next_s: seconds until the next iteration has finished; of a fault that passes, after it has passed.
    """

    injection: Injection
    hit: bool
    noticed_s: float | None = None
    next_s: float | None = None

    def __str__(self) -> str:
        when = f"{self.injection}, after {self.injection.after} iterations"
        if not self.hit:
            return f"{when}: there was none"
        noticed = "not said" if self.noticed_s is None else f"said after {self.noticed_s:.1f} s"
        return f"{when}: {noticed}, next iteration after {self.next_s:.1f} s"


class DisturbedRun:
    """Runs a command until it has finished, or a deadline has passed.

    Args:
        options: options of `learner/main.py`, without the run directory.
    """

    def __init__(self, options: Sequence[str], run_dir: Path, deadline_s: float) -> None:
        self._run_dir = run_dir
        script = str(PROJECT_ROOT / "learner" / "main.py")
        self._command = [sys.executable, script, *options, "--run-dir", str(run_dir), "--resume", "auto"]
        self._deadline_s = deadline_s
        self.starts = 0

    def run(self, injections: Sequence[Injection] = ()) -> Iterator[Outcome]:
        """Train to the end; yield what becomes of each injection.

        Raises:
            LearnerError: the run failed, or it has not ended by the deadline.
        """
        until = time.monotonic() + self._deadline_s
        with self._run_dir.with_suffix(".log").open("ab") as log:
            process = self._started(log)
            try:
                for injection in injections:
                    self._wait_for(process, until, injection.after)
                    time.sleep(injection.delay_s)
                    outcome, process = self._disturb(injection, process, log, until)
                    yield outcome
                self._wait_for(process, until, None)
            except BaseException:
                _kill_all(process)
                raise
        if process.returncode != 0:
            raise LearnerError(f"the run ended with exit status {process.returncode}: see {self._run_dir}.log")

    def _disturb(
        self, injection: Injection, process: subprocess.Popen[bytes], log: IO[bytes], until: float
    ) -> tuple[Outcome, subprocess.Popen[bytes]]:
        if process.poll() is not None:
            return Outcome(injection, hit=False), process
        started = time.time()
        if not inject(injection, psutil.Process(process.pid)):
            return Outcome(injection, hit=False), process
        noticed = None
        if injection.target is Target.DRIVER and injection.fault is Fault.KILL:
            process.wait(GONE_S)
            noticed, process = time.time() - started, self._started(log)
        passed, done = time.time(), self._iterations()
        self._wait_for(process, until, done + 1)
        recovered = time.time()
        if noticed is None:
            noticed = self._noticed(started)
        passing = injection.fault in (Fault.SLOW, Fault.FULL_DISK)
        return Outcome(injection, True, noticed, recovered - (passed if passing else started)), process

    def _started(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.Popen(
            self._command, cwd=PROJECT_ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def _wait_for(self, process: subprocess.Popen[bytes], until: float, iterations: int | None) -> None:
        """Until so many iterations have finished, or the process has ended."""
        while process.poll() is None and (iterations is None or self._iterations() < iterations):
            if time.monotonic() > until:
                raise LearnerError(f"the run has not ended after {self._deadline_s:g} s: see {self._run_dir}.log")
            time.sleep(POLL_S)

    def _iterations(self) -> int:
        """Iterations of both stages that have finished."""
        return sum(line["kind"] == "train" for line in whole_lines(self._run_dir / "metrics.jsonl"))

    def _noticed(self, since: float) -> float | None:
        """Seconds from a time to the first warning after it."""
        log = self._run_dir / "logs" / "run.log"
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
            if WARNING in line:
                at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                if at >= since:
                    return at - since
        return None


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, without one that is being written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for child in (*psutil.Process(process.pid).children(recursive=True), process):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
