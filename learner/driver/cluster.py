"""Ray cluster of a run: the one it was submitted to, or a private one on this machine."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from common.config.run import Config
from common.errors import ConfigError
from learner.preflight.checks import ROUNDING, gpus_wanted

PROJECT_ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 10.0


@contextmanager
def ray_cluster(config: Config) -> Iterator[None]:
    """Connect to the cluster, or start one that ends with the block.

    Raises:
        ConfigError: there is no cluster at RAY_ADDRESS, or it cannot be started.
    """
    try:
        if ADDRESS in os.environ:
            _require_reachable(os.environ[ADDRESS])
            ray.init(log_to_driver=False)
            _say_what_is_waited_for(config)
        else:
            _start(config)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = ": is it up, and RAY_AUTH_MODE=token set if it asks for a token?" if ADDRESS in os.environ else ""
        raise ConfigError(f"no Ray cluster to run in: {reason}{remedy}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _start(config: Config) -> None:
    # Ray gives its workers a low priority by default; on this machine they are the main load.
    os.environ.setdefault("RAY_worker_niceness", "0")
    needed = config.learner.ranks * config.learner.num_cpus + config.workers.count * config.workers.num_cpus
    # Custom families and scorers must be importable in workers as they are in the command.
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, 1 + int(needed)),
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )


def _say_what_is_waited_for(config: Config) -> None:
    """GPUs may still join a cluster, so too few of them is not an error yet."""
    wanted, found = gpus_wanted(config), ray.cluster_resources().get("GPU", 0.0)
    if wanted > found + ROUNDING:
        print(f"waiting for GPUs: the run asks for {wanted:g}, the cluster has {found:g} so far", file=sys.stderr)


def _require_reachable(address: str) -> None:
    """Fail fast: Ray itself would retry for minutes."""
    plain = re.fullmatch(r"([^:/]+):(\d+)", address)
    if plain is None:
        return
    try:
        socket.create_connection((plain[1], int(plain[2])), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"{ADDRESS} = {address}: no answer ({error}): is the cluster up?") from error
