"""A few steps of the shipped run files of the shapes world, against golden files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from tests.helpers.running_service import PROJECT_ROOT, Run
from tests.helpers.shared_services import Cluster, ServedScorer, reward_servers

SHORT = {
    "--cold_start.iterations": "3",
    "--cold_start.student_every": "2",
    "--alignment.iterations": "2",
    "--alignment.signal_every": "null",
    "--evaluation.every": "2",
    "--evaluation.prompts": "4",
    "--evaluation.teacher_steps": "6",
    "--evaluation.final_prompts": "4",
    "--evaluation.grid_prompts": "2",
    "--learner.threads": "1",
}


MODELS = ("checker", "detector", "hps", "pickscore")
ZOO = PROJECT_ROOT / "zoo/weights"
SERVED = {
    "hps": ServedScorer("hps", ZOO / "hps"),
    "pickscore": ServedScorer("pickscore", ZOO / "pickscore"),
    "detector": ServedScorer("zoo.detector:DetectorScorer", ZOO / "detector"),
    "gold": ServedScorer("zoo.checker:GoldScorer", ZOO / "checker"),
}


STATISTICS = ("group_mean/", "group_error/")
"""Metrics of images in whole numbers: where processors round a pixel differently, it moves by one."""


def close_to(name: str, value: float) -> object:
    return pytest.approx(value, rel=2e-3, abs=5e-3 if name.startswith(STATISTICS) else 2e-4)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of the rewards of both run files, which the runs would start for themselves."""
    with reward_servers(SERVED, tmp_path_factory.mktemp("rewards")) as started:
        yield started


@pytest.mark.parametrize(("name", "pipelines"), [("shapes", "early_pipeline"), ("shapes_flux2", "flux2")])
def test_the_shapes_world_runs_as_recorded(
    name: str, pipelines: str, urls: dict[str, str], cluster: Cluster, tmp_path: Path
) -> None:
    """A few steps of both stages on the shipped weights of either family, two workers, against a golden file.

    After a change of the weights or of the numbers, record it anew with RECORD_GOLDEN=1 in the environment.
    """
    options = [word for pair in SHORT.items() for word in pair]
    options += [f"--rewards.{reward}.url={url}" for reward, url in urls.items()]
    run = Run(PROJECT_ROOT / f"deploy/runs/{name}.yaml", tmp_path / "run", "--quick", *options, cluster=cluster)
    run.finish()
    summary = run.summary()
    assert list(summary["policies"]) == ["teacher_6", "teacher_4", "cold_start", "rtdmd"]
    golden_file = PROJECT_ROOT / f"tests/data/golden_{name}_run.json"
    weights = sorted(path for part in (*MODELS, pipelines) for path in (ZOO / part).rglob("*.safetensors"))
    found = {
        "weights": {
            str(path.parent.relative_to(ZOO)): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in weights
        },
        "lines": run.metrics(),
        "policies": summary["policies"],
    }
    if "RECORD_GOLDEN" in os.environ:
        golden_file.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(golden_file.read_text())
    assert golden["weights"] == found["weights"], "the shipped weights have changed: record the golden file anew"
    assert [line[:3] for line in golden["lines"]] == [list(line[:3]) for line in found["lines"]]
    for (*_, expected), (*place, metrics) in zip(golden["lines"], found["lines"], strict=True):
        assert metrics == {name: close_to(name, value) for name, value in expected.items()}, place
    for policy, expected in golden["policies"].items():
        assert found["policies"][policy] == pytest.approx(expected, rel=2e-3, abs=2e-4)
