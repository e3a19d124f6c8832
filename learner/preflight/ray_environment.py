"""Environment of Ray: checked and completed before Ray is imported, and before anything starts.

A run on one machine starts a private cluster. It needs neither a home directory nor a short TMPDIR nor settings of Ray.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from common.errors import ConfigError
from common.short_folder import short_folder

ADDRESS = "RAY_ADDRESS"
TEMPORARY = "RAY_TMPDIR"
TOKEN = "RAY_AUTH_TOKEN"
OWN_AUTHENTICATION = ("RAY_AUTH_MODE", TOKEN, "RAY_AUTH_TOKEN_PATH")
UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
WARNINGS = "PYTHONWARNINGS"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a job that was submitted."""
PACKAGES = "working_dir_files"
"""Ray unpacks the working directories of jobs below folders of this name, and removes them when it likes."""
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1"
"""Ray's longest name of a socket, below its temporary folder."""


def cluster_address(environ: Mapping[str, str]) -> str | None:
    """The cluster that the run was submitted to; None if the run starts a private one."""
    address = environ.get(ADDRESS, "").strip()
    return None if address in ("", "local") else address


def prepare(environ: MutableMapping[str, str]) -> None:
    """Check RAY_ADDRESS; for a private cluster set what it needs. Ray reads some of it when it is imported.

    Raises:
        ConfigError: RAY_ADDRESS is the address of a dashboard.
    """
    address = cluster_address(environ)
    if address is None:
        # Under `uv run`, Ray would start every worker by `uv run` in a copy of the project without its environment.
        environ[UV_HOOK] = "0"
        if "error" in environ.get(WARNINGS, ""):
            # Otherwise Ray's own processes end at the first warning, and the cluster never starts.
            del environ[WARNINGS]
        if not any(name in environ for name in OWN_AUTHENTICATION):
            # Otherwise Ray writes a token into the home directory.
            environ[TOKEN] = secrets.token_hex(32)
    elif "://" in address and not address.startswith("ray://"):
        raise ConfigError(
            f"{ADDRESS} = {address}: that is the address of a dashboard, which only `ray job submit` takes: unset "
            f"{ADDRESS} to train on this machine, or submit: ray job submit --address {address} --working-dir . -- "
            "python learner/main.py --run-dir DIR"
        )


def temporary_folder(environ: Mapping[str, str]) -> Path:
    """The folder for Ray's sockets and logs: RAY_TMPDIR, TMPDIR, or a shorter one if TMPDIR is too long for a socket.

    Raises:
        ConfigError: RAY_TMPDIR is too long, or no folder can be written.
    """
    base = short_folder(len(f"/ray-{os.getuid()}{LONGEST_SOCKET}"), TEMPORARY, environ)
    shared = base / "ray"
    usable = not shared.exists() or os.access(shared, os.W_OK | os.X_OK)
    return shared if usable else base / f"ray-{os.getuid()}"


def check_storage(run_dir: Path, environ: Mapping[str, str]) -> None:
    """ConfigError if Ray would remove the run: a job's working directory is a temporary copy on the cluster."""
    if JOB not in environ:
        return
    resolved = Path(os.path.realpath(run_dir))
    if not run_dir.is_absolute() or PACKAGES in resolved.parts:
        raise ConfigError(
            f"--run-dir {run_dir}: inside a Ray job this is {resolved}, which Ray removes: give --run-dir an absolute "
            "path on storage that lasts and that every node has"
        )
