"""Services that integration tests share, because each takes as long to start as the test itself.

`ray_cluster` is one Ray cluster that many drivers join; `reward_servers` is one process of many scorers.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.waiting import wait_until

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 180.0

CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster on this machine; a driver that has `environment` joins it."""

    pid: int
    environment: Mapping[str, str]


@dataclass(frozen=True)
class ServedScorer:
    """One scorer of `reward_servers`: a built-in name or a class path, and its model directory."""

    scorer: str
    model: Path | None = None


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A cluster of four virtual CPUs, which ends with the block."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _process("-c", CLUSTER, environment={**token, "RAY_worker_niceness": "0"}) as started:
        assert started.stdout is not None
        address = started.stdout.readline().strip()
        yield Cluster(started.pid, {**token, "RAY_ADDRESS": address, "PYTHONPATH": str(PROJECT_ROOT)})


@contextmanager
def reward_servers(scorers: Mapping[str, ServedScorer], folder: Path, max_batch: int = 16) -> Iterator[dict[str, str]]:
    """The URL of each scorer by its name; scores do not depend on what else is asked.

    The models share the server's process, which imports their libraries once.
    """
    ready = folder / "ready.json"
    words = []
    for name, served in scorers.items():
        model = () if served.model is None else ("--model", str(served.model))
        words += ["--scorer", served.scorer, *model, "--name", name]
    shared = ("--port", "0", "--ready-file", str(ready), "--max-batch", str(max_batch), "--threads", "1")
    shared += ("--reproducible", "--in-process")
    with _process("-m", "reward_servers", *shared, *words) as started:

        def is_ready() -> bool:
            assert started.poll() is None, "the reward servers did not start"
            return ready.exists()

        wait_until(is_ready, "the reward servers to be ready", DEADLINE)
        base = f"http://127.0.0.1:{json.loads(ready.read_text())['port']}"
        yield {name: f"{base}/{name}" for name in scorers}


@contextmanager
def _process(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Python that lives as long as the block; its standard input stays open as long."""
    variables = {"PYTHONPATH": str(PROJECT_ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=PROJECT_ROOT,
        env=os.environ | variables | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            started.terminate()
            started.wait(DEADLINE)
