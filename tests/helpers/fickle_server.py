"""A reward server in its own process whose scorer fails on request (`tests.helpers.toy_scorers.FickleScorer`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.waiting import wait_until

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0


class FickleServer:
    """A reward server process with a mode, on a port it keeps when it is started again."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder, self._port = name, folder / name, 0
        self._folder.mkdir()
        self.mode("healthy")
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        ready = self._folder / "ready"
        ready.unlink(missing_ok=True)
        command = [
            *(
                sys.executable,
                "-m",
                "reward_servers",
                "--scorer",
                "tests.helpers.toy_scorers:FickleScorer",
                "--name",
                self._name,
            ),
            *("--model", str(self._folder), "--port", str(self._port), "--ready-file", str(ready)),
            *("--parent-pid", str(os.getpid()), "--reproducible"),
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=log, stderr=log)
        wait_until(ready.exists, f"{self._name} is ready")
        self._port = json.loads(ready.read_text())["port"]

    def mode(self, mode: str) -> None:
        partial = self._folder / "partial"
        partial.write_text(mode)
        partial.replace(self._folder / "mode")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE)

    def fail(self, failure: str) -> None:
        if failure == "down":
            self.kill()
        else:
            self.mode(failure)

    def recover(self) -> None:
        self.mode("healthy")
        if self._process.poll() is not None:
            self.start()
