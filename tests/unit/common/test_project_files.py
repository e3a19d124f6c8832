"""Files that ship with the project are found from any directory; those of the working directory come first."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.project_files import PROJECT_ROOT, found_path
from learner.preflight.command_line import DEFAULT_RUN_FILE, parse


def test_a_path_is_looked_up_here_and_then_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found_path(Path("deploy/runs")) == PROJECT_ROOT / "deploy/runs"
    assert found_path(Path("no/such")) == Path("no/such")
    (tmp_path / "deploy/runs").mkdir(parents=True)
    assert found_path(Path("deploy/runs")) == Path("deploy/runs")


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
    assert parse([], {}).config.backbone.path == Path("zoo/weights/pipeline")
