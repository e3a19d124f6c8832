"""Prometheus metrics of a reward server: one registry per process, every series labelled with its scorer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from common.rewards.api import FloatArray

BATCH_BUCKETS = tuple(float(2**power) for power in range(9))
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SCORE_BUCKETS = 40


class ServerMetrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._scores = _ScoreHistograms()
        self._registry.register(self._scores)
        self._model_processes = _ModelProcesses()
        self._registry.register(self._model_processes)
        by_scorer, registry = ("scorer",), self._registry
        self._requests = Counter(
            "reward_server_requests_total", "Answered requests.", ("scorer", "path", "code"), registry=self._registry
        )
        self._seconds = Histogram(
            "reward_server_request_seconds",
            "Seconds from the request's head to its answer.",
            ("scorer", "path"),
            registry=self._registry,
            buckets=SECONDS_BUCKETS,
        )
        self._queue_images = Gauge("reward_server_queue_images", "Images waiting.", by_scorer, registry=registry)
        self._queue_bytes = Gauge(
            "reward_server_queue_bytes", "Bytes held by requests not yet answered.", by_scorer, registry=registry
        )
        self._batch = Histogram(
            "reward_server_batch_images", "Images per model call.", by_scorer, registry=registry, buckets=BATCH_BUCKETS
        )
        self._model_seconds = Histogram(
            "reward_server_model_seconds",
            "Seconds per model call.",
            by_scorer,
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )

        self._restarts = Counter(
            "reward_server_model_restarts", "Restarts of the model's process.", by_scorer, registry=registry
        )

    def of_scorer(self, scorer: str, low: float, high: float) -> ScorerMetrics:
        """The series of one scorer whose scores lie in [low, high]."""
        return ScorerMetrics(
            scorer,
            requests=self._requests,
            seconds=self._seconds,
            queue_images=self._queue_images.labels(scorer),
            queue_bytes=self._queue_bytes.labels(scorer),
            batch=self._batch.labels(scorer),
            model_seconds=self._model_seconds.labels(scorer),
            restarts=self._restarts.labels(scorer),
            scores=self._scores.add(scorer, low, high),
        )

    def watch_process(self, scorers: Sequence[str], pid: Callable[[], int]) -> None:
        """Report processor time, memory and files of the model process of these scorers."""
        self._model_processes.add(",".join(scorers), pid)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class ScorerMetrics:
    """The metrics of one scorer's queue and routes."""

    def __init__(
        self,
        scorer: str,
        requests: Counter,
        seconds: Histogram,
        queue_images: Gauge,
        queue_bytes: Gauge,
        batch: Histogram,
        model_seconds: Histogram,
        restarts: Counter,
        scores: Histogram,
    ) -> None:
        self._scorer = scorer
        self._requests = requests
        self._seconds = seconds
        self._queue_images = queue_images
        self._queue_bytes = queue_bytes
        self._batch = batch
        self._model_seconds = model_seconds
        self._restarts = restarts
        self._scores = scores

    def answered(self, path: str, code: int, seconds: float) -> None:
        self._requests.labels(self._scorer, path, str(code)).inc()
        self._seconds.labels(self._scorer, path).observe(seconds)

    def waiting(self, images: int) -> None:
        self._queue_images.set(images)

    def holding(self, size: int) -> None:
        self._queue_bytes.set(size)

    def model_called(self, images: int, seconds: float) -> None:
        self._batch.observe(images)
        self._model_seconds.observe(seconds)

    def restarted(self) -> None:
        self._restarts.inc()

    def scored(self, scores_B: FloatArray) -> None:
        for score in scores_B.tolist():
            self._scores.observe(score)


class _ScoreHistograms(Collector):
    """One metric whose buckets differ per scorer, as score ranges do; the client library does not support that."""

    def __init__(self) -> None:
        self._families: list[Histogram] = []

    def add(self, scorer: str, low: float, high: float) -> Histogram:
        family = Histogram(
            "reward_server_score", "Scores answered.", ("scorer",), registry=None, buckets=_score_buckets(low, high)
        )
        self._families.append(family)
        return family.labels(scorer)

    def collect(self) -> Iterator[Metric]:
        merged = Metric("reward_server_score", "Scores answered.", "histogram")
        for family in self._families:
            for metric in family.collect():
                merged.samples += metric.samples
        yield merged


class _ModelProcesses(Collector):
    """The metrics of `ProcessCollector` for each model process, labelled with its scorers."""

    def __init__(self) -> None:
        self._processes: list[tuple[str, ProcessCollector]] = []

    def add(self, scorers: str, pid: Callable[[], int]) -> None:
        self._processes.append((scorers, ProcessCollector("reward_server_model", pid, registry=None)))

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for scorers, process in self._processes:
            for metric in process.collect():
                one = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    one.add_sample(sample.name, {"scorer": scorers}, sample.value)
        yield from merged.values()


def _score_buckets(low: float, high: float) -> tuple[float, ...]:
    if math.isfinite(low) and math.isfinite(high):
        return tuple(np.linspace(low, high, SCORE_BUCKETS + 1).tolist())
    return Histogram.DEFAULT_BUCKETS
