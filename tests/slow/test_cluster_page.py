"""docs/cluster.md as written: its commands, on a cluster of one machine with ports and folders of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.project_files import PROJECT_ROOT
from tests.helpers.waiting import wait_until

DEADLINE = 600.0
QUICK = "--quick --learner.threads 1 --evaluation.teacher false --alignment.iterations 12 --checkpoint.every 4"
"""Options that make the page's run a short one."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def page(tmp_path: Path) -> list[str]:
    lines = (PROJECT_ROOT / "docs/cluster.md").read_text(encoding="utf-8").splitlines()
    commands = [line.strip().replace("/shared", str(tmp_path)) for line in lines if line.startswith("    ")]
    return [f"{line} {QUICK}" if "learner/main.py" in line else line for line in commands]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a shell with the project's environment activated.

    A home of its own leaves the token of this machine's user alone.
    """
    (tmp_path / "home").mkdir()
    places = {"HOME": str(tmp_path / "home"), "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    places["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | places | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def run(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=PROJECT_ROOT,
        env=environment | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def cluster(page: list[str], environment: dict[str, str], tmp_path: Path) -> Iterator[None]:
    """`ray start --head`, kept in the foreground so that it ends with the test."""
    generate, head = page[2:4]
    assert head == "ray start --head"
    run(generate, environment)
    dashboard = environment["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    words = ["--block", "--num-cpus=6", *(f"--{name}={value}" for name, value in ports.items())]
    # The name of a socket has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    words.append(f"--temp-dir={folder}")
    program = [str(Path(sys.executable).parent / "ray"), "start", "--head", *words]
    with (tmp_path / "head.log").open("w") as log:
        started = subprocess.Popen(
            program, env=environment | {"RAY_AUTH_MODE": "token"}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: "runtime started" in (tmp_path / "head.log").read_text(), "the head to start", 120)
        yield
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.timeout(1500)
def test_a_job_is_submitted_scaled_stopped_and_continued(
    page: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    assert len(page) == 10
    first, _, scale, stop, second = page[5:]
    metrics = tmp_path / "runs/shapes/metrics.jsonl"

    def ended() -> bool:
        return any(state in run("ray job list", environment) for state in ("FAILED", "SUCCEEDED"))

    def aligned() -> int:
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return sum('"alignment"' in line and '"train"' in line for line in lines)

    run(first, environment)
    wait_until(lambda: aligned() > 0 or ended(), "the run to align", DEADLINE, every=5.0)
    assert aligned() > 0, run("ray job logs first", environment)
    assert "uses 4 rollout workers" in run(scale, environment)
    run(stop, environment)
    wait_until(lambda: "FAILED" in run("ray job list", environment), "the first job to end", DEADLINE, every=5.0)
    stopped = aligned()
    assert 0 < stopped < 12
    assert f"stopped on request after {stopped} iterations of alignment" in run("ray job logs first", environment)
    run(second, environment)
    wait_until(lambda: "SUCCEEDED" in run("ray job list", environment), "the second job to end", DEADLINE, every=5.0)
    assert aligned() == 12
    assert list(json.loads((tmp_path / "runs/shapes/summary.json").read_text())["policies"]) == ["cold_start", "rtdmd"]
