"""The wheel carries every module, the run files and the shapes world, so that `rtdmd` works from any directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "deploy", "learner", "reward_servers", "rollout_workers", "zoo")
DEADLINE_S = 280


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, since a build leaves files in its directory and takes older ones from there."""
    directory = tmp_path_factory.mktemp("wheel")
    sources = directory / "sources"
    for package in PACKAGES:
        shutil.copytree(PROJECT_ROOT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(PROJECT_ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(directory)], cwd=sources, check=True, timeout=DEADLINE_S)
    (built,) = directory.glob("rtdmd-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as an installation lays it into site-packages."""
    directory = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(directory)
    return directory


def run(installed: Path, directory: Path, *words: str, deadline_s: float = DEADLINE_S) -> str:
    """Output of python started in `directory`; the wheel's packages come before those of the sources."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_every_file_of_the_shapes_world(wheel: Path) -> None:
    expected = {path for package in PACKAGES for path in (PROJECT_ROOT / package).rglob("*.py")}
    expected |= set((PROJECT_ROOT / "deploy/runs").glob("*.yaml"))
    expected |= {path for folder in ("weights", "prompts") for path in (PROJECT_ROOT / "zoo" / folder).rglob("*.*")}
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "rtdmd = learner.commands:main" in content.read(entry_points).decode()
    assert {str(path.relative_to(PROJECT_ROOT)) for path in expected} - names == set()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_the_default_run_is_forecast_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    root = run(installed, tmp_path, "-c", "from common.project_files import PROJECT_ROOT; print(PROJECT_ROOT)")
    assert Path(root.strip()) == installed
    assert "an iteration of alignment" in run(installed, tmp_path, "-m", "learner.commands", "forecast")
    flux2 = ("forecast", "--config", "deploy/runs/shapes_flux2.yaml")
    assert "an iteration of alignment" in run(installed, tmp_path, "-m", "learner.commands", *flux2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_trains_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "-m", "learner.commands", "train", "--quick", deadline_s=1100)
    (left,) = (tmp_path / "runs").iterdir()
    assert json.loads((left / "summary.json").read_text())["policies"]["rtdmd"]
