"""Serves the metrics of a run, and keeps the file that gives Prometheus their addresses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry
from ray.exceptions import RayTaskError

from common.config.run import Config
from common.console_stream import LOG
from common.errors import RunStopped
from common.rewards.access import RewardAccess
from learner.driver.listed_targets import listed_targets
from learner.preflight.ray_environment import cluster_address, temporary_folder
from learner.records.metrics_server import MetricsServer, Targets
from learner.records.prometheus import RunMetrics

RAY_TARGETS = "prom_metrics_service_discovery.json"
"""Ray keeps such a file of its own endpoints in its temporary folder, for Prometheus on the head node."""
OWN_TARGETS = "prometheus_targets.json"


def run_metrics(config: Config, run_dir: Path) -> RunMetrics:
    """The metrics of a run that starts."""
    metrics = RunMetrics(CollectorRegistry(), config.run.name)
    metrics.configured(config, run_dir)
    return metrics


@contextmanager
def metrics_endpoint(config: Config, run_dir: Path, metrics: RunMetrics, access: RewardAccess) -> Iterator[None]:
    """Serve the metrics while the block runs, and list the endpoint and the reward servers for Prometheus.

    An error that ends the block is counted first. If Prometheus reads the endpoint, it gets one more scrape.
    """
    if config.metrics.port is None:
        yield
        return
    with ExitStack() as stack:
        server = stack.enter_context(MetricsServer(config.metrics.port, metrics.registry, config.metrics.host))
        targets = Targets(targets_path(config, run_dir), config.run.name)
        host = config.metrics.host
        address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
        reached = f"127.0.0.1:{server.port}" if host in ("0.0.0.0", "::") else address
        stack.enter_context(listed_targets(targets, reached, access))
        LOG.info(f"metrics: http://{address}/metrics")
        stack.callback(server.wait_for_scrape)
        try:
            yield
        except (RunStopped, KeyboardInterrupt):
            raise
        except RayTaskError as error:
            metrics.failed(error.cause)
            raise
        except BaseException as error:
            metrics.failed(error)
            raise


def targets_path(config: Config, run_dir: Path) -> Path:
    """The file that lists the endpoints of a run: in metrics.targets, beside Ray's own, or in the run directory."""
    name = f"rtdmd_{config.run.name}.json"
    if config.metrics.targets is not None:
        return config.metrics.targets / name
    if cluster_address(os.environ) is not None:
        folder = temporary_folder(os.environ)
        if (folder / RAY_TARGETS).is_file() and os.access(folder, os.W_OK):  # another user may have started Ray
            return folder / name
    return run_dir / "logs" / OWN_TARGETS
