"""What a reward server counts, in a registry of its own."""

from __future__ import annotations

import math

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.reward_api import FloatArray

BATCH_BUCKETS = tuple(float(2**power) for power in range(9))
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SCORE_BUCKETS = 40


class ServerMetrics:
    """Counters of one server, labelled with its scorer's name."""

    def __init__(self, scorer: str, low: float, high: float) -> None:
        self._registry = CollectorRegistry()
        requests = Counter(
            "reward_server_requests_total", "Answered requests.", ("scorer", "path", "code"), registry=self._registry
        )
        seconds = Histogram(
            "reward_server_request_seconds",
            "Seconds from the request's head to its answer.",
            ("scorer", "path"),
            registry=self._registry,
            buckets=SECONDS_BUCKETS,
        )
        queue = Gauge("reward_server_queue_images", "Images waiting.", ("scorer",), registry=self._registry)
        batch = Histogram(
            "reward_server_batch_images",
            "Images per model call.",
            ("scorer",),
            registry=self._registry,
            buckets=BATCH_BUCKETS,
        )
        scores = Histogram(
            "reward_server_score",
            "Scores answered.",
            ("scorer",),
            registry=self._registry,
            buckets=_score_buckets(low, high),
        )
        self._scorer = scorer
        self._requests = requests
        self._seconds = seconds
        self._queue = queue.labels(scorer)
        self._batch = batch.labels(scorer)
        self._scores = scores.labels(scorer)

    def answered(self, path: str, code: int, seconds: float) -> None:
        self._requests.labels(self._scorer, path, str(code)).inc()
        self._seconds.labels(self._scorer, path).observe(seconds)

    def waiting(self, images: int) -> None:
        self._queue.set(images)

    def model_called(self, images: int) -> None:
        self._batch.observe(images)

    def scored(self, scores_B: FloatArray) -> None:
        for score in scores_B.tolist():
            self._scores.observe(score)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


def _score_buckets(low: float, high: float) -> tuple[float, ...]:
    if math.isfinite(low) and math.isfinite(high):
        return tuple(np.linspace(low, high, SCORE_BUCKETS + 1).tolist())
    return Histogram.DEFAULT_BUCKETS
