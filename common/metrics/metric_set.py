"""The metrics of one process, made from the catalogue on a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values

from common.metrics.spec import Kind, MetricSpec

# One process has one registry. With PROMETHEUS_MULTIPROC_DIR in the environment, as images of web servers have it,
# every value would be written into that folder, which is another program's and may not exist.
values.ValueClass = values.MutexValue


class MetricSet:
    """Makes every metric of some specs, and returns a metric's series by its label values.

    Args:
        run: value of the label `run`, which metrics of the driver have; "" for a process that has no such label.
    """

    def __init__(self, specs: Iterable[MetricSpec], registry: CollectorRegistry, run: str = "") -> None:
        # The time of a counter's creation would be a second series beside each.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._run = (run,) if run else ()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for spec in specs:
            if spec.from_library or (spec.kind is Kind.HISTOGRAM and not spec.buckets):
                continue
            if spec.kind is Kind.GAUGE:
                self._gauges[spec.name] = Gauge(spec.name, spec.meaning, spec.all_labels, registry=registry)
            elif spec.kind is Kind.COUNTER:
                self._counters[spec.name] = Counter(spec.name, spec.meaning, spec.all_labels, registry=registry)
            else:
                self._histograms[spec.name] = Histogram(
                    spec.name, spec.meaning, spec.all_labels, registry=registry, buckets=spec.buckets
                )

    def gauge(self, spec: MetricSpec, *values: str) -> Gauge:
        """The series of a gauge with these label values; KeyError for a metric of another kind or process."""
        return self._gauges[spec.name].labels(*self._run, *values)

    def counter(self, spec: MetricSpec, *values: str) -> Counter:
        """The series of a counter, as `gauge`."""
        return self._counters[spec.name].labels(*self._run, *values)

    def histogram(self, spec: MetricSpec, *values: str) -> Histogram:
        """The series of a histogram, as `gauge`."""
        return self._histograms[spec.name].labels(*self._run, *values)
