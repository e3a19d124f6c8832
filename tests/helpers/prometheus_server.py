"""A real Prometheus (Debian's package) with the project's configuration and rules."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.helpers.promql import PROJECT_ROOT
from tests.helpers.waiting import wait_until

FOLDER = PROJECT_ROOT / "deploy/prometheus"


@dataclass(frozen=True)
class Prometheus:
    """A running server; `targets` is the folder for `metrics.targets`."""

    url: str
    targets: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression now, each with `metric` and `value`."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def firing(self) -> set[tuple[str, str]]:
        """Name and severity of every alert that fires now."""
        alerts = self.query('ALERTS{alertstate="firing"}')
        return {(one["metric"]["alertname"], one["metric"]["severity"]) for one in alerts}


@contextmanager
def prometheus(folder: Path, interval: str) -> Iterator[Prometheus]:
    """Start Prometheus with the project's files; only the interval of scrapes and evaluations is another one.

    The test is skipped where Prometheus is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    targets = folder / "targets"
    targets.mkdir(parents=True)
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    settings["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    del settings["alerting"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.copy(FOLDER / "rules.yml", folder)
    port = _free_port()
    command = [program, "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _is_ready(process, url, folder), "Prometheus to be ready")
        yield Prometheus(url, targets)
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(process: subprocess.Popen[bytes], url: str, folder: Path) -> bool:
    assert process.poll() is None, (folder / "prometheus.log").read_text()
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
