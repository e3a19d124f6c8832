"""Describes one Prometheus metric: its name, kind, unit, labels and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kind of a metric, as Prometheus names it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Process(StrEnum):
    """The process that serves a metric."""

    DRIVER = "driver"
    REWARD_SERVER = "reward server"


@dataclass(frozen=True)
class Key:
    """A key of `metrics.jsonl`, and the values of its metric's labels.

    A name that ends in `*` stands for every key that begins so. The rest of such a key is the value of the metric's
    label, or of its two labels if a colon separates them.
    """

    name: str
    values: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """The beginning of the keys, or "" for one whole key."""
        return self.name[:-1] if self.name.endswith("*") else ""


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Attributes:
        unit: a base unit of Prometheus (seconds, bytes), what is counted, or "1" for a pure number.
        labels: their names; a metric of the driver also has the label `run`.
        keys: keys of `metrics.jsonl` with the same content. A counter sums them over the iterations.
        buckets: upper bounds of a histogram; empty where the code chooses them for each series.
        from_library: made by the client library, not from this description.
        needs_fault: without data until something has failed.
    """

    name: str
    kind: Kind
    process: Process
    unit: str
    labels: tuple[str, ...]
    meaning: str
    keys: tuple[Key, ...] = ()
    buckets: tuple[float, ...] = ()
    from_library: bool = False
    needs_fault: bool = False

    @property
    def series(self) -> tuple[str, ...]:
        """The names that an expression may use."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)

    @property
    def all_labels(self) -> tuple[str, ...]:
        return ("run", *self.labels) if self.process is Process.DRIVER else self.labels
