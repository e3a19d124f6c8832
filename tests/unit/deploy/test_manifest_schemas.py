"""Every manifest of deploy/kuberay passes the schema of its kind, strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helpers.manifests import APPLIED, KUBERAY, Manifest, of_kind, problems, ray_cluster, rendered

NO_MANIFESTS = ("kustomization.yaml", "run.yaml", "prometheus_adapter.yaml")
FILES = sorted(
    path for path in KUBERAY.rglob("*.yaml") if path.name not in NO_MANIFESTS and path.parent.name != "from_job"
)


def name(path: Path) -> str:
    return str(path.relative_to(KUBERAY))


def documents(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_valid(path: Path) -> None:
    """Without kubectl too."""
    assert [problem for one in documents(path) for problem in problems(one)] == []


@pytest.mark.parametrize("folder", APPLIED)
def test_what_is_applied_is_valid(folder: str) -> None:
    found = {f"{one['kind']} {one['metadata']['name']}": problems(one) for one in rendered(folder)}
    assert {one: wrong for one, wrong in found.items() if wrong} == {}
    assert len(found) > 10


@pytest.mark.parametrize("size", ["one_node", "two_nodes", "four_nodes"])
def test_a_cluster_that_stays_is_that_of_the_job(size: str) -> None:
    stays = rendered(f"cluster/{size}")
    assert ray_cluster(stays) == ray_cluster(rendered(size))
    assert of_kind(stays, "RayJob") == []


def misspelt(path: str, *keys: str | int) -> Manifest:
    """The first document of a file with a field that its kind does not have."""
    document = documents(KUBERAY / path)[0]
    node = document
    for key in keys:
        node = node[key]
    node["replica"] = 1
    return document


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("base/ray_job.yaml", ("spec", "rayClusterSpec", "workerGroupSpecs", 1)),
        ("base/ray_job.yaml", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0)),
        ("base/rewards.yaml", ("spec", "template", "spec", "containers", 0)),
        ("base/redis.yaml", ("spec",)),
    ],
)
def test_a_misspelt_field_is_refused(path: str, keys: tuple[str | int, ...]) -> None:
    assert "replica" in " ".join(problems(misspelt(path, *keys)))


def test_a_wrong_value_and_an_unknown_kind_are_refused() -> None:
    job = documents(KUBERAY / "base/ray_job.yaml")[0]
    job["spec"]["backoffLimit"] = "often"
    assert "often" in " ".join(problems(job))
    assert problems({"apiVersion": "apps/v1", "kind": "Deploymnet", "metadata": {"name": "a"}}) != []
    with pytest.raises(AssertionError, match="RayJobb has no schema"):
        problems({"apiVersion": "ray.io/v1", "kind": "RayJobb"})
