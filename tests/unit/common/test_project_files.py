"""Files that ship with the project are found from any directory; those of the working directory come first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.project_files import PROJECT_ROOT, found_path, python_environment
from learner.preflight.command_line import DEFAULT_RUN_FILE, parse


def test_a_path_is_looked_up_here_and_then_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found_path(Path("deploy/runs")) == PROJECT_ROOT / "deploy/runs"
    assert found_path(Path("no/such")) == Path("no/such")
    (tmp_path / "deploy/runs").mkdir(parents=True)
    assert found_path(Path("deploy/runs")) == Path("deploy/runs")


def test_a_path_is_looked_up_in_further_folders_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "models").mkdir(parents=True)
        (folder / "deploy").mkdir()
    assert found_path(Path("models"), [tmp_path / "none", first, second]) == first / "models"
    assert found_path(Path("deploy"), [first]) == PROJECT_ROOT / "deploy"


@pytest.mark.parametrize("module", ["reward_servers", "reward_servers.convert", "zoo.build"])
def test_a_common_of_the_users_does_not_hide_the_projects(tmp_path: Path, module: str) -> None:
    """`python -m` searches the current directory first."""
    if module != "reward_servers":
        pytest.importorskip("torch")
    (tmp_path / "common.py").write_text("raise SystemExit('the wrong common')\n")
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env=python_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_default_run_and_its_world_are_found_from_an_empty_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse([], {}).config
    models = [reward.model for reward in config.rewards]
    paths = [config.backbone.path, config.prompts.train, config.prompts.evaluation, *models]
    assert [path for path in paths if path is None or not path.is_relative_to(PROJECT_ROOT)] == []
    assert all(path.exists() for path in paths)


def test_in_the_project_every_path_stays_as_the_run_file_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    assert DEFAULT_RUN_FILE.is_file()
    assert parse([], {}).config.backbone.path == Path("zoo/weights/early_pipeline")


FIND = "import sys; from common.project_files import import_own; import_own(sys.argv[1]); import_own('json'); {more}"


def test_a_folder_named_as_a_library_hides_nothing(tmp_path: Path) -> None:
    """A clone of Triton beside the run: libraries try to import `triton`, and find the folder if it is searched."""
    (tmp_path / "triton").mkdir()
    more = "import importlib.util; sys.exit(importlib.util.find_spec('triton') is not None)"
    command = [sys.executable, "-P", "-c", FIND.format(more=more), "common.urls"]
    done = subprocess.run(command, cwd=tmp_path, env=python_environment(), timeout=120, check=False)
    assert done.returncode == 0


def test_a_module_of_the_current_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import helper_of_mine\n")
    (tmp_path / "helper_of_mine.py").write_text("")
    command = [sys.executable, "-P", "-c", FIND.format(more=""), "mine"]
    done = subprocess.run(command, cwd=tmp_path, env=python_environment(), timeout=120, check=False)
    assert done.returncode == 0
