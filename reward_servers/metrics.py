"""Prometheus metrics of a reward server: one registry per process, every series labelled with its scorer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from common.metrics import reward_server as catalogue
from common.metrics.metric_set import MetricSet
from common.rewards.api import FloatArray

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
        self._set = MetricSet(catalogue.REWARD_SERVER_METRICS, self._registry)

    def of_scorer(self, scorer: str, low: float, high: float) -> ScorerMetrics:
        """The series of one scorer whose scores lie in [low, high]."""
        return ScorerMetrics(self._set, scorer, self._scores.add(scorer, low, high))

    def watch_process(self, scorers: Sequence[str], pid: Callable[[], int]) -> None:
        """Report processor time, memory and files of the model process of these scorers."""
        self._model_processes.add(",".join(scorers), pid)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class ScorerMetrics:
    """The metrics of one scorer's queue and routes."""

    def __init__(self, metrics: MetricSet, scorer: str, scores: Histogram) -> None:
        self._set, self._scorer, self._scores = metrics, scorer, scores
        self._queue_images = metrics.gauge(catalogue.QUEUE_IMAGES, scorer)
        self._queue_bytes = metrics.gauge(catalogue.QUEUE_BYTES, scorer)
        self._batch = metrics.histogram(catalogue.BATCH_IMAGES, scorer)
        self._model_seconds = metrics.histogram(catalogue.MODEL_SECONDS, scorer)
        self._restarts = metrics.counter(catalogue.MODEL_RESTARTS, scorer)

    def answered(self, path: str, code: int, seconds: float) -> None:
        self._set.counter(catalogue.REQUESTS, self._scorer, path, str(code)).inc()
        self._set.histogram(catalogue.REQUEST_SECONDS, self._scorer, path).observe(seconds)

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
            catalogue.SCORE.name,
            catalogue.SCORE.meaning,
            catalogue.SCORE.labels,
            registry=None,
            buckets=_score_buckets(low, high),
        )
        self._families.append(family)
        return family.labels(scorer)

    def collect(self) -> Iterator[Metric]:
        merged = Metric(catalogue.SCORE.name, catalogue.SCORE.meaning, catalogue.SCORE.kind)
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
