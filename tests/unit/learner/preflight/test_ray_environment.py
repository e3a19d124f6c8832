"""Ray's environment is prepared before its import. Places that Ray deletes are refused."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package

from common.errors import ConfigError
from learner.preflight.ray_environment import (
    JOB,
    LONGEST_SOCKET,
    check_storage,
    cluster_address,
    prepare,
    temporary_folder,
)

PROJECT_ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(
    ("value", "address"),
    [(None, None), ("", None), (" ", None), ("local", None), ("auto", "auto"), ("10.0.0.7:6379", "10.0.0.7:6379")],
)
def test_an_empty_address_is_none(value: str | None, address: str | None) -> None:
    assert cluster_address({} if value is None else {"RAY_ADDRESS": value}) == address


def test_a_private_cluster_needs_neither_home_nor_uv() -> None:
    environment: dict[str, str] = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}
    prepare(environment)
    assert environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    assert len(bytes.fromhex(environment["RAY_AUTH_TOKEN"])) == 32
    another: dict[str, str] = {}
    prepare(another)
    assert another["RAY_AUTH_TOKEN"] != environment["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize(("value", "kept"), [("error", False), ("error::DeprecationWarning", False), ("ignore", True)])
def test_processes_of_a_private_cluster_do_not_end_at_a_warning(value: str, kept: bool) -> None:
    """As in a shell of somebody who tests with PYTHONWARNINGS=error."""
    environment = {"PYTHONWARNINGS": value}
    prepare(environment)
    assert ("PYTHONWARNINGS" in environment) is kept


@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_authentication_that_somebody_set_is_left_alone(name: str) -> None:
    environment = {name: "own"}
    prepare(environment)
    assert environment == {name: "own", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


def test_a_cluster_keeps_its_own_settings() -> None:
    environment = {"RAY_ADDRESS": "10.0.0.7:6379"}
    prepare(environment)
    assert environment == {"RAY_ADDRESS": "10.0.0.7:6379"}


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.org"])
def test_the_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS = {address}: .* unset RAY_ADDRESS .*--address {address} "):
        prepare({"RAY_ADDRESS": address})


def test_a_long_tmpdir_is_replaced_by_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / "slurm_jobdir" / "account" / "project-with-a-long-name" / "1355700"
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = temporary_folder({"TMPDIR": str(long)})
    assert not folder.is_relative_to(tmp_path)
    assert len(os.fsencode(folder) + LONGEST_SOCKET.encode()) <= 107
    assert folder.name in ("ray", f"ray-{os.getuid()}")


def test_a_named_folder_is_taken_or_refused(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as short:
        assert temporary_folder({"RAY_TMPDIR": short}) == Path(short) / "ray"
    for wrong in (tmp_path / ("x" * 60), "/proc/nowhere"):
        with pytest.raises(ConfigError, match=f"RAY_TMPDIR = {wrong}: set RAY_TMPDIR to a folder that can be written"):
            temporary_folder({"RAY_TMPDIR": str(wrong)})


def test_inside_a_job_a_run_needs_a_place_that_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0e7594db1cd03204"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    job = {JOB: "{}"}
    check_storage(tmp_path / "runs" / "mine", job)
    check_storage(Path("runs/mine"), {})
    for temporary in (Path("runs/mine"), package / "runs" / "mine"):
        with pytest.raises(ConfigError, match=f"--run-dir {temporary}: inside a Ray job this is {package}/runs/mine"):
            check_storage(temporary, job)


def test_what_a_job_uploads_is_small(tmp_path: Path) -> None:
    """Ray reads .gitignore and .rayignore. Neither models nor runs nor environments of the project are uploaded."""
    project = tmp_path / "project"
    wanted = ("learner/main.py", "deploy/runs/shapes.yaml", "common/rewards/http.py", "zoo/weights/hps/merges.txt")
    unwanted = ("models/sd3/a.safetensors", "data/train.jsonl", "runs/a/x", ".venv/x", ".venv-judge/x", ".git/x")
    for name in (*wanted, *unwanted):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (project / name).write_text((PROJECT_ROOT / name).read_text())
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(project), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        files = {name for name in package.namelist() if not name.startswith(".")}
    assert files - {"models/", "data/"} == set(wanted)
