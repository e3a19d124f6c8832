"""The Kubernetes manifests of deploy/kuberay: what a person applies, and the schemas that they must keep.

Schemas refuse unknown fields. A kind without a schema is refused too, so that none passes without a check.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT_ROOT = Path(__file__).resolve().parents[2]
KUBERAY = PROJECT_ROOT / "deploy/kuberay"
SIZES = ("one_node", "two_nodes", "four_nodes")
APPLIED = (*SIZES, *(f"cluster/{size}" for size in SIZES))
"""The folders that `kubectl apply -k` takes."""
SCHEMAS = PROJECT_ROOT / "tests/data/kuberay"
KUBERNETES = "1.34"
RAY, MONITORING = "ray.io/v1", "monitoring.coreos.com/v1"

Manifest = dict[str, Any]

POD_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": MONITORING},
        "kind": {"const": "PodMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {"type": "object", "required": ["matchLabels"]},
                "podMetricsEndpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["port"],
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                            "honorLabels": {"type": "boolean"},
                            "relabelings": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["targetLabel", "replacement"],
                                    "additionalProperties": False,
                                    "properties": {
                                        "targetLabel": {"type": "string", "pattern": "^[a-z_]+$"},
                                        "replacement": {"type": "string", "minLength": 1},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
    "additionalProperties": False,
}

_RULE = {
    "type": "object",
    "required": ["expr"],
    "oneOf": [{"required": ["record"]}, {"required": ["alert"]}],
    "additionalProperties": False,
    "properties": {
        "record": {"type": "string"},
        "alert": {"type": "string"},
        "expr": {"type": "string"},
        "for": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"},
        "keep_firing_for": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
PROMETHEUS_RULE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": MONITORING},
        "kind": {"const": "PrometheusRule"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["groups"],
            "additionalProperties": False,
            "properties": {
                "groups": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "rules"],
                        "additionalProperties": False,
                        "properties": {"name": {"type": "string"}, "rules": {"type": "array", "items": _RULE}},
                    },
                }
            },
        },
    },
}
"""The parts of prometheus-operator's kinds that the manifests use."""
OPERATORS = {"PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}


@functools.cache
def _rendered(folder: str) -> str:
    """The manifests of a folder as JSON, which is read faster than YAML."""
    command = ["kubectl", "kustomize", str(KUBERAY / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"deploy/kuberay/{folder}: {done.stderr}"
    return json.dumps(list(yaml.safe_load_all(done.stdout)))


def rendered(folder: str) -> list[Manifest]:
    """What `kubectl apply -k deploy/kuberay/FOLDER` sends. The test is skipped where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, which renders the folders of deploy/kuberay")
    manifests: list[Manifest] = json.loads(_rendered(folder))
    return manifests


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def ray_cluster(manifests: list[Manifest]) -> Manifest:
    """The specification of the Ray cluster, of a job or by itself."""
    jobs = of_kind(manifests, "RayJob")
    (spec,) = [job["spec"]["rayClusterSpec"] for job in jobs] or [
        one["spec"] for one in of_kind(manifests, "RayCluster")
    ]
    return spec


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template in a manifest, at any depth."""
    for node in _maps(manifest):
        template = node.get("template")
        if isinstance(template, dict) and "containers" in template.get("spec", {}):
            yield template
        if "submitterPodTemplate" in node:
            yield node["submitterPodTemplate"]


def problems(manifest: Manifest) -> list[str]:
    """What the schema of its kind refuses in a manifest."""
    jsonschema = pytest.importorskip("jsonschema")
    if manifest["apiVersion"] == RAY:
        schema = _ray_schema(manifest["kind"])
    elif manifest["apiVersion"] == MONITORING and manifest["kind"] in OPERATORS:
        schema = OPERATORS[manifest["kind"]]
    else:
        return _core_problems(json.dumps(manifest))
    found = jsonschema.Draft202012Validator(schema).iter_errors(_with_defaults(copy.deepcopy(manifest)))
    return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


@functools.cache
def _core_problems(manifest: str) -> list[str]:
    """Cached, because all sizes share most manifests."""
    validator = pytest.importorskip("kubernetes_validate")
    try:
        validator.validate(json.loads(manifest), KUBERNETES, strict=True)
    except (validator.ValidationError, validator.SchemaNotFoundError) as error:
        return [str(error)]
    return []


@functools.cache
def _ray_schema(kind: str) -> Manifest:
    found = {crd["kind"]: crd["schema"] for crd in (json.loads(path.read_text()) for path in SCHEMAS.glob("*.json"))}
    assert kind in found, f"{RAY} {kind} has no schema in {SCHEMAS.relative_to(PROJECT_ROOT)}"
    schema = _strict(found[kind])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    """The schema as the API server reads it with strict field validation."""
    for node in _maps(schema):
        if (
            node.get("type") == "object"
            and "properties" in node
            and "additionalProperties" not in node
            and not node.get("x-kubernetes-preserve-unknown-fields")
        ):
            node["additionalProperties"] = False
        if node.pop("x-kubernetes-int-or-string", None):
            node.pop("type", None)
            node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return schema


def _with_defaults(manifest: Manifest) -> Manifest:
    """The manifest with the values that the API server fills in."""
    for node in _maps(manifest):
        for group in node.get("workerGroupSpecs") or []:
            group.setdefault("minReplicas", 0)
            group.setdefault("maxReplicas", 2**31 - 1)
    return manifest


def _maps(node: Any) -> Iterator[dict[str, Any]]:
    """Every map in a document, the outer ones first."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _maps(value)
