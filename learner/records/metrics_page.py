"""Generates docs/metrics.md from the catalogue of metrics.

python -m learner.records.metrics_page > docs/metrics.md
"""

from __future__ import annotations

from collections.abc import Iterable

from common.metrics.driver import DRIVER_METRICS
from common.metrics.reward_server import REWARD_SERVER_METRICS
from common.metrics.spec import Key, MetricSpec

INTRODUCTION = """\
# Metrics

After this page you can find the name, unit, labels and meaning of every Prometheus metric, and the metric of every key
of `metrics.jsonl`.

The page is generated from `common/metrics/`. Do not edit it. Regenerate it with

    python -m learner.records.metrics_page > docs/metrics.md

[operations.md](operations.md) says how to start Prometheus and Grafana, and what each alert asks of you.

- **Times and sizes** are in seconds and bytes. A name that ends in `_ratio` is a fraction from 0 to 1. Unit 1 is a pure
  number.
- **Counters** begin at 0 with every session of a run. Those marked * have no data until something has failed.
- **Gauges** of an iteration hold the newest value. All others change when the thing itself changes.
- **Keys** are those of `metrics.jsonl`: of `metrics`, and with `seconds/` those of `seconds`. A counter sums a key over
  the iterations."""

HEAD = "| metric | kind | unit | labels | meaning | key |\n|---|---|---|---|---|---|"


def metrics_page() -> str:
    """The page as Markdown."""
    parts = (
        INTRODUCTION,
        "## The driver of a run\n\nEach has the label `run`, the name of the run. The driver also serves what workers "
        "and learner report to it.",
        _table(DRIVER_METRICS),
        "## A reward server\n\n`scorer` is the name under which the server serves a reward. Prometheus adds `run` and "
        "`reward` to the servers that a run lists.",
        _table(REWARD_SERVER_METRICS),
    )
    return "\n\n".join(parts) + "\n"


def _table(specs: Iterable[MetricSpec]) -> str:
    return "\n".join([HEAD, *map(_row, specs)])


def _row(spec: MetricSpec) -> str:
    name = f"`{spec.name}`{' *' if spec.needs_fault else ''}"
    labels, keys = ", ".join(f"`{label}`" for label in spec.labels), ", ".join(map(_key, spec.keys))
    return f"| {name} | {spec.kind} | {spec.unit} | {labels} | {spec.meaning} | {keys} |"


def _key(key: Key) -> str:
    values = f" ({', '.join(key.values)})" if key.values else ""
    return f"`{key.name}`{values}"


if __name__ == "__main__":
    print(metrics_page(), end="")
