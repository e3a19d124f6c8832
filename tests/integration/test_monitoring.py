"""A run of the shapes world under the real Prometheus: its data, its alerts, and none without a fault."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.metrics import CATALOGUE
from deploy.grafana.panels import DASHBOARDS
from tests.helpers.prometheus_server import Prometheus, prometheus
from tests.helpers.promql import PROJECT_ROOT, recorded, rules, selectors
from tests.helpers.running_service import Run
from tests.helpers.shared_services import Cluster
from tests.helpers.waiting import wait_until

ENDLESS = {
    "--evaluation.teacher": "false",
    "--cold_start.iterations": "3",
    "--alignment.iterations": "2000",
    "--alignment.signal_every": "1",
    "--alignment.prompts_per_iteration": "2",
    "--evaluation.prompts": "2",
    "--evaluation.final_prompts": "2",
    "--evaluation.grid_prompts": "1",
    "--checkpoint.every": "2",
    "--learner.threads": "1",
    "--learner.restarts": "0",
}
"""It ends when the test says so."""
NEVER_WITHOUT_FAULT = {spec.name for spec in CATALOGUE if spec.needs_fault}
"""Counters that docs/metrics.md marks with a star."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), interval="1s") as started:
        yield started


def panels_without_data(server: Prometheus) -> list[str]:
    """Titles and expressions of panels that have no data, and names of recording rules that have none."""
    found = [
        f"{panel.title}: {expression}"
        for panels in DASHBOARDS.values()
        for panel in panels
        for expression in panel.curves
        if not panel.needs_fault and not server.query(expression.replace("$run", ".*"))
    ]
    return found + [name for name in recorded() if not server.query(name)]


def alerts_without_data(server: Prometheus) -> list[str]:
    """The selectors of alerts that find nothing. An alert itself has no data while it does not fire."""
    names = {str(one): one.name for rule in rules() if "alert" in rule for one in selectors(rule["expr"])}
    return [one for one, name in names.items() if name not in NEVER_WITHOUT_FAULT and not server.query(one)]


def test_a_run_is_seen_and_its_faults_are_told_apart(server: Prometheus, cluster: Cluster, tmp_path: Path) -> None:
    """Without a fault: data everywhere and no alert. A worker that is replaced: information. A dead learner: a page."""
    words = [word for pair in ENDLESS.items() for word in pair]
    words += ["--metrics.targets", str(server.targets)]
    shapes = PROJECT_ROOT / "deploy/runs/shapes.yaml"
    run = Run(shapes, tmp_path / "run", "--quick", *words, cluster=cluster)
    try:
        run.wait_for_lines(8, stage="alignment")
        (file,) = server.targets.glob("*.json")
        jobs = [entry["labels"]["job"] for entry in json.loads(file.read_text())]
        assert jobs == ["driver", *["reward_server"] * 4]
        wait_until(lambda: not panels_without_data(server), "data in every panel", 60, every=1.0)
        assert alerts_without_data(server) == []
        ever = server.query('last_over_time(ALERTS{alertstate="firing"}[1h])')
        assert [one["metric"]["alertname"] for one in ever] == []

        workers = run.processes("ray::RolloutWorker")
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        restarted = ("WorkerRestarted", "info")
        wait_until(lambda: restarted in server.firing(), "the alert on the restart", every=0.5)
        assert server.firing() == {restarted}

        (learner,) = run.processes("ray::Learner")
        os.kill(learner.pid, signal.SIGKILL)
        run.finish(status=1)
        assert "it was lost once (learner.restarts = 0)" in run.output
        failed = ("RunFailed", "page")
        wait_until(lambda: failed in server.firing(), "the page for a failed run", every=0.5)
        assert list(server.targets.glob("*.json")) == []
        (alert,) = server.query('ALERTS{alertname="RunFailed", alertstate="firing"}')
        assert (alert["metric"]["run"], alert["metric"]["error"]) == ("shapes-quick", "LearnerError")
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(60)
