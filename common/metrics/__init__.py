"""The catalogue of every Prometheus metric of the project: `CATALOGUE`. docs/metrics.md is generated from it."""

from __future__ import annotations

from common.metrics.driver import DRIVER_METRICS
from common.metrics.reward_server import REWARD_SERVER_METRICS
from common.metrics.spec import MetricSpec

CATALOGUE: tuple[MetricSpec, ...] = (*DRIVER_METRICS, *REWARD_SERVER_METRICS)
