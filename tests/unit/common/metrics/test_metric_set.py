"""Metrics of one process are kept in its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.project_files import PROJECT_ROOT

COUNT = """
from prometheus_client import CollectorRegistry
from common.metrics import driver
from common.metrics.metric_set import MetricSet
registry = CollectorRegistry()
MetricSet(driver.DRIVER_METRICS, registry, "run").counter(driver.WORKER_RESTARTS).inc(2)
print(registry.get_sample_value(driver.WORKER_RESTARTS.name, {"run": "run"}))
"""


@pytest.mark.parametrize("folder", ["there", "missing"])
@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_the_folder_of_other_programs_is_left_alone(tmp_path: Path, variable: str, folder: str) -> None:
    """Images of web servers set it for their own workers."""
    (tmp_path / "there").mkdir()
    environment = os.environ | {variable: str(tmp_path / folder), "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2.0", done.stderr
    assert list((tmp_path / "there").iterdir()) == []
