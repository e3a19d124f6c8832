"""More than a hundred faults in whole runs of the service: every run ends as the undisturbed one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.chaos.__main__ import main

SEEDS, INJECTIONS = range(14), 8


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_hundred_faults_change_nothing(tmp_path: Path) -> None:
    statuses = [
        main(["--run-dir", str(tmp_path), "--seed", str(seed), "--injections", str(INJECTIONS)]) for seed in SEEDS
    ]
    results = [json.loads((tmp_path / f"seed-{seed}.json").read_text()) for seed in SEEDS]
    assert {result["seed"]: result["problems"] for result in results if result["problems"]} == {}
    assert statuses == [0] * len(SEEDS)
    assert sum(one["hit"] for result in results for one in result["injections"]) >= 100
