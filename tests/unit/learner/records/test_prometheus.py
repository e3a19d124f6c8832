"""Metrics are served under their names, from one registry, on loopback."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from common.errors import ConfigError
from learner.records import prometheus as metrics


def test_every_name_is_exposed_once_and_nothing_else() -> None:
    registry = CollectorRegistry()
    metrics.DriverMetrics.build(registry)
    metrics.LearnerMetrics.build(registry)
    text = generate_latest(registry).decode()
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    declared = [value for name, value in vars(metrics).items() if name.isupper()]
    served = sorted(family for family in families if not family.endswith("_created"))
    assert served == sorted(declared)


def test_a_served_value_can_be_read_and_the_port_is_freed() -> None:
    registry = CollectorRegistry()
    metrics.DriverMetrics.build(registry).dropped_groups.labels(cause="timeout").inc(2)
    server = metrics.serve(0, registry)
    try:
        text = httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=5).text
    finally:
        server.close()
    assert 'rtdmd_dropped_groups_total{cause="timeout"} 2.0' in text
    metrics.serve(server.port, registry).close()


def test_a_taken_port_is_named() -> None:
    server = metrics.serve(0, CollectorRegistry())
    try:
        with pytest.raises(ConfigError, match=rf"metrics\.port = {server.port}: cannot listen on 127\.0\.0\.1"):
            metrics.serve(server.port, CollectorRegistry())
    finally:
        server.close()
