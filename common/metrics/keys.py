"""Finds the Prometheus metric of a key of `metrics.jsonl`."""

from __future__ import annotations

from common.metrics.driver import DRIVER_METRICS, OTHER
from common.metrics.spec import Key, MetricSpec

_KEYS = [(key, spec) for spec in DRIVER_METRICS for key in spec.keys]
_WHOLE: dict[str, tuple[MetricSpec, Key]] = {key.name: (spec, key) for key, spec in _KEYS if not key.prefix}
_PREFIXES = sorted(
    ((key.prefix, spec) for key, spec in _KEYS if key.prefix), key=lambda found: len(found[0]), reverse=True
)
"""The longest first: `seconds/worker_` comes before `seconds/`."""


def located(key: str) -> tuple[MetricSpec, tuple[str, ...]]:
    """The metric of a key, and its label values; `OTHER` for a key that the catalogue does not name.

    Seconds have the prefix `seconds/`.
    """
    if key in _WHOLE:
        spec, found = _WHOLE[key]
        return spec, found.values
    for prefix, spec in _PREFIXES:
        if key.startswith(prefix):
            rest = key.removeprefix(prefix)
            values = tuple(rest.split(":", 1)) if len(spec.labels) == 2 else (rest,)
            if len(values) == len(spec.labels):
                return spec, values
    return OTHER, (key,)
