"""Catalogue of the metrics that a reward server serves."""

from __future__ import annotations

from common.metrics.spec import Kind, MetricSpec, Process

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_BUCKETS = tuple(float(2**power) for power in range(9))
BY_SCORER = ("scorer",)


def _spec(
    name: str,
    kind: Kind,
    unit: str,
    meaning: str,
    labels: tuple[str, ...] = BY_SCORER,
    buckets: tuple[float, ...] = (),
    *,
    from_library: bool = False,
) -> MetricSpec:
    return MetricSpec(
        name, kind, Process.REWARD_SERVER, unit, labels, meaning, buckets=buckets, from_library=from_library
    )


def _process(prefix: str, labels: tuple[str, ...], whose: str) -> tuple[MetricSpec, ...]:
    """The metrics of `prometheus_client.ProcessCollector`."""
    return (
        _spec(f"{prefix}cpu_seconds_total", Kind.COUNTER, "seconds", f"Processor time of {whose}.", labels,
              from_library=True),
        _spec(f"{prefix}resident_memory_bytes", Kind.GAUGE, "bytes", f"Resident memory of {whose}.", labels,
              from_library=True),
        _spec(f"{prefix}virtual_memory_bytes", Kind.GAUGE, "bytes", f"Virtual memory of {whose}.", labels,
              from_library=True),
        _spec(f"{prefix}start_time_seconds", Kind.GAUGE, "seconds", f"Start of {whose}, in seconds since 1970.", labels,
              from_library=True),
        _spec(f"{prefix}open_fds", Kind.GAUGE, "files", f"Open files of {whose}.", labels, from_library=True),
        _spec(f"{prefix}max_fds", Kind.GAUGE, "files", f"Files that {whose} may open.", labels, from_library=True),
    )  # fmt: skip


REQUESTS = _spec(
    "reward_server_requests_total", Kind.COUNTER, "requests", "Responses, by HTTP status.", ("scorer", "path", "code")
)
REQUEST_SECONDS = _spec(
    "reward_server_request_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "Time from a request's head to its response.",
    ("scorer", "path"),
    SECONDS_BUCKETS,
)
QUEUE_IMAGES = _spec("reward_server_queue_images", Kind.GAUGE, "images", "Images that wait for the model.")
QUEUE_BYTES = _spec("reward_server_queue_bytes", Kind.GAUGE, "bytes", "Memory that unanswered requests hold.")
BATCH_IMAGES = _spec(
    "reward_server_batch_images", Kind.HISTOGRAM, "images", "Images per model call.", buckets=BATCH_BUCKETS
)
MODEL_SECONDS = _spec(
    "reward_server_model_seconds", Kind.HISTOGRAM, "seconds", "Time per model call.", buckets=SECONDS_BUCKETS
)
MODEL_RESTARTS = _spec(
    "reward_server_model_restarts_total", Kind.COUNTER, "restarts", "Restarts of the model's process."
)
SCORE = _spec("reward_server_score", Kind.HISTOGRAM, "1", "Scores in responses; the buckets span the scorer's range.")

REWARD_SERVER_METRICS = (
    REQUESTS,
    REQUEST_SECONDS,
    QUEUE_IMAGES,
    QUEUE_BYTES,
    BATCH_IMAGES,
    MODEL_SECONDS,
    MODEL_RESTARTS,
    SCORE,
    *_process("process_", (), "the server's own process"),
    *_process("reward_server_model_process_", BY_SCORER, "the model's process"),
)
