"""A run whose reward fails and recovers, and which is then scaled and stopped through its own Redis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from learner.driver.embedded_redis import running_address
from learner.tools.control import main
from tests.helpers.fickle_server import FickleServer
from tests.helpers.running_service import Run, wait_until, write_config
from tests.helpers.shared_services import Cluster
from tests.helpers.tiny_rewards import write_hps

PROMPTS = ("red", "blue", "a dot", "two", "big", "small", "a line", "green")
LEFT_OUT = "renormalised_groups/fickle:"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FickleServer]:
    started = FickleServer("fickle", tmp_path)
    yield started
    started.kill()


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path, server: FickleServer) -> Path:
    path = write_config(tmp_path / "run.yaml", tiny_pipeline, write_hps(tmp_path / "hps"), PROMPTS)
    values = yaml.safe_load(path.read_text())
    values["rewards"][1] = {"name": "fickle", "url": [server.url], "outage": "renormalise"}
    values["alignment"]["iterations"] = 5000
    values["evaluation"] |= {"every": 10_000, "teacher": False}
    path.write_text(yaml.safe_dump(values))
    return path


def aligned(run: Run) -> list[dict[str, Any]]:
    return [line["metrics"] for line in run.lines() if (line["stage"], line["kind"]) == ("alignment", "train")]


def left_out(metrics: dict[str, float]) -> bool:
    return any(name.startswith(LEFT_OUT) for name in metrics)


def test_a_run_goes_on_without_a_reward_and_stops_on_request(
    config: Path, server: FickleServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "0123456789abcdef")
    run = Run(config, config.parent / "run", cluster=cluster)
    run.wait_for_lines(1, stage="alignment")
    server.mode("nan")
    wait_until(lambda: left_out(aligned(run)[-1]), "groups to be trained without the reward")
    server.mode("healthy")
    wait_until(lambda: not left_out(aligned(run)[-1]), "the reward to be trained on again")
    # Only a request that is signed with the token of the run counts.
    with running_address(run.run_dir / "logs" / "redis.conf").connect() as stranger:
        stranger.set("rtdmd:run:tiny", "stop")
    count = len(aligned(run))
    wait_until(lambda: len(aligned(run)) >= count + 2, "the run to go on")
    assert main([str(run.run_dir), "workers", "2"]) == 0
    wait_until(lambda: len(run.processes("ray::RolloutWorker")) == 2, "another worker to be started")
    assert main([str(run.run_dir), "workers", "1"]) == 0
    wait_until(lambda: "worker 2" in run.output, "the other worker to leave")
    assert main([str(run.run_dir), "stop"]) == 0
    run.finish(status=130)
    lines = aligned(run)
    assert "has left: the run uses fewer workers now" in run.output
    assert f"stopped on request after {len(lines)} iterations of alignment; continue with --resume" in run.output
    assert (run.run_dir / "checkpoints" / f"alignment-{len(lines):06d}").is_dir()
    for metrics in lines:
        assert all(math.isfinite(value) for value in metrics.values())
        # Brightness of real images: a zero could only be made up.
        assert metrics.get("reward/fickle", 1.0) > 0
        assert metrics["dropped_groups"] == 0
        missing = sum(count for name, count in metrics.items() if name.startswith(LEFT_OUT))
        assert ("reward/fickle" in metrics) == (missing < 4)
