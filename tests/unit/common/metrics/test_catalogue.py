"""The catalogue: names, units and labels as Prometheus wants them, and a metric for every key of metrics.jsonl."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from common.metrics import CATALOGUE
from common.metrics import driver as catalogue
from common.metrics.keys import located
from common.metrics.metric_set import MetricSet
from common.metrics.spec import Kind, MetricSpec

DATA = Path(__file__).resolve().parents[3] / "data"
NAME = re.compile(r"[a-z][a-z0-9_]*")
FORBIDDEN = ("_ms", "_milliseconds", "_minutes", "_hours", "_mib", "_gib", "_megabytes", "_percent")
BOUNDED = {
    *("run", "stage", "part", "network", "error", "state", "process", "reward", "cause", "outcome"),
    *("detector", "statistic", "term", "policy", "metric", "key", "scorer", "path", "code"),
}
"""Labels with few values: names in a run file or in the code. No worker, prompt or URL."""


def test_every_name_is_used_once() -> None:
    names = [spec.name for spec in CATALOGUE]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("spec", CATALOGUE, ids=lambda spec: spec.name)
def test_names_and_units_are_those_of_prometheus(spec: MetricSpec) -> None:
    assert NAME.fullmatch(spec.name)
    assert not any(part in f"{spec.name}_" for part in (f"{one}_" for one in FORBIDDEN))
    assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER)
    base = spec.name.removesuffix("_total")
    assert (spec.unit == "seconds") == base.endswith("_seconds")
    assert (spec.unit == "bytes") == base.endswith("_bytes")
    assert not base.endswith("_ratio") or spec.unit == "1"
    assert set(spec.all_labels) <= BOUNDED
    assert spec.meaning[0].isupper() or spec.meaning[0].isdigit()
    assert spec.meaning.endswith(".")


@pytest.mark.parametrize("name", ["golden_shapes_run", "golden_shapes_flux2_run"])
def test_every_key_of_a_run_has_a_metric_of_its_own(name: str) -> None:
    lines = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))["lines"]
    keys = {key for _, _, kind, metrics in lines if kind == "train" for key in metrics}
    assert keys
    assert [key for key in keys if located(key)[0] is catalogue.OTHER] == []


@pytest.mark.parametrize(
    ("key", "spec", "labels"),
    [
        ("student_gradient_norm", catalogue.GRADIENT_NORM, ("student",)),
        ("reward/hps", catalogue.REWARD, ("hps",)),
        ("renormalised_groups/hps:timeout", catalogue.RENORMALISED_GROUPS, ("hps", "timeout")),
        ("seconds/worker_decode", catalogue.WORKER_SECONDS, ("decode",)),
        ("seconds/update_student", catalogue.PART_SECONDS, ("update_student",)),
        ("seconds/step", catalogue.ITERATION_SECONDS, ()),
        ("my_own_number", catalogue.OTHER, ("my_own_number",)),
        ("renormalised_groups/without_cause", catalogue.OTHER, ("renormalised_groups/without_cause",)),
    ],
)
def test_a_key_leads_to_its_metric(key: str, spec: MetricSpec, labels: tuple[str, ...]) -> None:
    assert located(key) == (spec, labels)


def test_a_set_has_the_label_run_only_where_the_catalogue_says_so() -> None:
    registry = CollectorRegistry()
    metrics = MetricSet(CATALOGUE, registry, run="a")
    metrics.gauge(catalogue.REWARD, "hps").set(0.5)
    assert registry.get_sample_value("rtdmd_reward", {"run": "a", "reward": "hps"}) == 0.5
    with pytest.raises(KeyError):
        metrics.counter(catalogue.REWARD, "hps")
