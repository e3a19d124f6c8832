"""Ray cluster of a run: the one it was submitted to, or a private one on this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.job_config import JobConfig

from common import WAIT_POLICY
from common.config.processes import ROUNDING
from common.config.run import Config
from common.console_stream import LOG
from common.errors import ConfigError, one_line
from common.project_files import PROJECT_ROOT, python_environment
from learner.driver.process_output import logged_processes
from learner.preflight.checks import gpus_wanted
from learner.preflight.ray_environment import ADDRESS, cluster_address, temporary_folder

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""Environment variable with the settings of torch's allocator."""
CONNECT_SECONDS = 10.0
EXPECTED = (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError)
"""Errors of a cluster that cannot be used. If a node takes too long to start, Ray raises a bare Exception."""


@contextmanager
def ray_cluster(config: Config) -> Iterator[None]:
    """Connect to the cluster, or start one that ends with the block. Lines of its processes go to the run's log.

    Raises:
        ConfigError: there is no cluster at RAY_ADDRESS, or it cannot be started.
    """
    with logged_processes():
        _connect(config)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(config: Config) -> None:
    address = cluster_address(os.environ)
    try:
        with _kept_sigterm():
            if address is not None:
                _require_reachable(address)
                ray.init(log_to_driver=True)
                _say_what_is_waited_for(config)
            else:
                _start(config)
    except Exception as error:
        if not isinstance(error, EXPECTED) and type(error) is not Exception:
            raise
        remedy = "" if address is None else ": is it up, and RAY_AUTH_MODE=token set if it asks for a token?"
        if address is None and "timed out" in str(error).lower():
            remedy = "; the machine may be busy, or the disk of RAY_TMPDIR or TMPDIR full: look there, and start again"
        raise ConfigError(f"no Ray cluster to run in: {one_line(error)}{remedy}") from error


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end the process without our error line or a report."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # Ray's answer to the signal
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def actor_environment(*, releases_memory: bool = False) -> dict[str, Any]:
    """Ray's `runtime_env` of our actors: what a cluster that was started without us would not give them.

    `releases_memory`: whether they give a GPU's memory back between their phases.
    """
    variables = {WAIT_POLICY: os.environ[WAIT_POLICY]}
    if releases_memory:
        # Else a block of memory that is used in part could not be given back.
        variables[ALLOCATOR] = os.environ.get(ALLOCATOR, "expandable_segments:True")
    return {"env_vars": variables}


class _ProjectFirst(list[str]):
    """Search path of Ray's workers, which Ray extends by the driver's current directory, ahead of everything else.

    There, a package named as one of ours would take its place. `import_own` searches the current directory last.
    """

    def extend(self, _of_ray: Iterable[str]) -> None:
        return


def _start(config: Config) -> None:
    # Ray gives its workers a low priority by default; on this machine they are the main load.
    os.environ.setdefault("RAY_worker_niceness", "0")
    needed = config.learner.ranks * config.learner.num_cpus + config.workers.most * config.workers.num_cpus
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, 1 + int(needed)),
        include_dashboard=False,
        _temp_dir=str(temporary_folder(os.environ)),
        log_to_driver=True,
        job_config=JobConfig(_py_driver_sys_path=_ProjectFirst([str(PROJECT_ROOT)])),
        runtime_env={"env_vars": {"PYTHONPATH": python_environment()["PYTHONPATH"]}},
    )


def _say_what_is_waited_for(config: Config) -> None:
    """GPUs may still join a cluster, so too few of them is not an error yet."""
    wanted, found = gpus_wanted(config), ray.cluster_resources().get("GPU", 0.0)
    if wanted > found + ROUNDING:
        LOG.warning(f"waiting for GPUs: the run asks for {wanted:g}, the cluster has {found:g} so far")


def _require_reachable(address: str) -> None:
    """Fail fast: Ray itself would retry for minutes."""
    plain = re.fullmatch(r"([^:/]+):(\d+)", address)
    if plain is None:
        return
    try:
        socket.create_connection((plain[1], int(plain[2])), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"{ADDRESS} = {address}: no answer ({error}): is the cluster up?") from error
