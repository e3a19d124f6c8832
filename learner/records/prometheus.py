"""Prometheus metrics: every name is defined once, and the objects of each process are built in one place.

Names are constants because dashboards and alerts quote them. Each process builds its own set on its own registry.
Histograms and counters come from prometheus_client (Ray's own metric sums are bucket midpoints).
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from common.errors import ConfigError

ITERATION = "rtdmd_iteration"
STAGE_SECONDS_TOTAL = "rtdmd_stage_seconds_total"
REWARD = "rtdmd_reward"
EVALUATION = "rtdmd_evaluation"
IMAGES_TOTAL = "rtdmd_images_total"
DROPPED_GROUPS_TOTAL = "rtdmd_dropped_groups_total"
REFUSED_GROUPS_TOTAL = "rtdmd_refused_groups_total"
RENORMALISED_GROUPS_TOTAL = "rtdmd_renormalised_groups_total"
LEFT_OUT_GRADIENTS_TOTAL = "rtdmd_left_out_gradients_total"
WORKER_RESTARTS_TOTAL = "rtdmd_worker_restarts_total"
WORKER_IDLE_SHARE = "rtdmd_worker_idle_share"
POLICY_VERSION = "rtdmd_policy_version"
LOSS = "rtdmd_loss"
WATCHDOG_ALARMS_TOTAL = "rtdmd_watchdog_alarms_total"
NETWORK_UPDATES_TOTAL = "rtdmd_network_updates_total"


@dataclass(frozen=True)
class DriverMetrics:
    """Metrics of the driver: progress, time, rewards and losses of data."""

    iteration: Gauge
    stage_seconds: Counter
    reward: Gauge
    evaluation: Gauge
    images: Counter
    dropped_groups: Counter
    refused_groups: Counter
    renormalised_groups: Counter
    left_out_gradients: Counter
    worker_restarts: Counter
    worker_idle_share: Gauge
    policy_version: Gauge
    watchdog_alarms: Counter

    @classmethod
    def build(cls, registry: CollectorRegistry) -> Self:
        return cls(
            iteration=Gauge(ITERATION, "Iterations finished, by training stage.", ["stage"], registry=registry),
            stage_seconds=Counter(
                STAGE_SECONDS_TOTAL, "Seconds spent, by part of an iteration.", ["part"], registry=registry
            ),
            reward=Gauge(REWARD, "Mean reward of the newest iteration, by reward.", ["reward"], registry=registry),
            evaluation=Gauge(
                EVALUATION, "Newest evaluation, by policy and metric.", ["policy", "metric"], registry=registry
            ),
            images=Counter(IMAGES_TOTAL, "Images sampled for training, by worker.", ["worker"], registry=registry),
            dropped_groups=Counter(
                DROPPED_GROUPS_TOTAL, "Groups dropped whole, by cause.", ["cause"], registry=registry
            ),
            refused_groups=Counter(
                REFUSED_GROUPS_TOTAL,
                "Groups that the learner refused, by fault and by the worker that sampled them.",
                ["fault", "worker"],
                registry=registry,
            ),
            renormalised_groups=Counter(
                RENORMALISED_GROUPS_TOTAL,
                "Groups trained without a reward that was out, by reward and cause.",
                ["cause"],
                registry=registry,
            ),
            left_out_gradients=Counter(
                LEFT_OUT_GRADIENTS_TOTAL,
                "Samples trained without the gradient of a reward that was out, by reward and cause.",
                ["cause"],
                registry=registry,
            ),
            worker_restarts=Counter(
                WORKER_RESTARTS_TOTAL, "Workers that took the place of a dead one.", registry=registry
            ),
            worker_idle_share=Gauge(
                WORKER_IDLE_SHARE,
                "Part of the newest iteration in which a worker's model was idle, by worker.",
                ["worker"],
                registry=registry,
            ),
            policy_version=Gauge(POLICY_VERSION, "Newest published policy version.", registry=registry),
            watchdog_alarms=Counter(
                WATCHDOG_ALARMS_TOTAL, "Alarms of the watchdog, by detector.", ["detector"], registry=registry
            ),
        )


@dataclass(frozen=True)
class LearnerMetrics:
    """Metrics of the learner: losses and updates."""

    loss: Gauge
    updates: Counter

    @classmethod
    def build(cls, registry: CollectorRegistry) -> Self:
        return cls(
            loss=Gauge(LOSS, "Newest value, by loss.", ["loss"], registry=registry),
            updates=Counter(
                NETWORK_UPDATES_TOTAL, "Optimizer steps, by network (student, fake).", ["network"], registry=registry
            ),
        )


@dataclass(frozen=True)
class MetricsServer:
    """A running /metrics endpoint."""

    port: int
    _server: WSGIServer
    _thread: Thread

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def serve(port: int, registry: CollectorRegistry, host: str = "127.0.0.1") -> MetricsServer:
    """Serve a registry on host:port (loopback by default); port 0 picks a free one, which the result names.

    Raises:
        ConfigError: the port is taken or not permitted.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"metrics.port = {port}: cannot listen on {host}:{port} ({error.strerror}): choose another, or 0 for any"
        ) from error
    return MetricsServer(server.server_port, server, thread)
