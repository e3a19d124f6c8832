"""Runs in the trackers' own packages, without a network: what was sent is read back with the package."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config.trackers import TrackerKind
from common.errors import ConfigError
from learner.records.trackers import protocol
from learner.records.trackers.feed import Feed
from learner.records.trackers.protocol import require_installed
from learner.tools.track import main
from tests.helpers.tracked_run import add_lines, metrics_line, tracked_config, write_tracked_run


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_tracked_run(tmp_path / "run")
    return tmp_path / "run"


def send_twice(run_dir: Path, kind: TrackerKind, capsys: pytest.CaptureFixture[str]) -> None:
    """Send with the command, then what was added."""
    assert main([str(run_dir), kind]) == 0, capsys.readouterr().err
    add_lines(run_dir, metrics_line("alignment", 2, **{"reward/hps": 0.75}))
    assert main([str(run_dir), kind]) == 0
    said = capsys.readouterr()
    assert said.out == f"5 lines of {run_dir} were sent to {kind}\n1 lines of {run_dir} were sent to {kind}\n"
    assert said.err == ""


def test_tensorboard(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send_twice(run_dir, TrackerKind.TENSORBOARD, capsys)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/hps")] == [(3, 0.25), (4, 0.5), (5, 0.75)]
    assert math.isnan(events.Scalars("loss/fake_score_loss")[1].value)
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (3, 32, 16)
    assert image.encoded_image_string == (run_dir / "samples" / "alignment-000001.png").read_bytes()
    (table,) = events.Tensors("policies")
    assert b"| teacher_28 | 0.75 | 0.5 |\n| rtdmd | 0.875 |  |" in table.tensor_proto.string_val[0]
    assert b"| cold_start.iterations | 2 |" in events.Tensors("configuration")[0].tensor_proto.string_val[0]


@pytest.fixture
def without_wandb_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb reads its variables once, and its process outlives a run."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()


@pytest.mark.usefixtures("without_wandb_settings")
def test_weights_and_biases_offline(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    send_twice(run_dir, TrackerKind.WANDB, capsys)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    assert len(ids) == 1
    written = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    for part in (b"reward/hps", b"evaluation/gold", b"cold_start.iterations", b"image-file", b"table-file"):
        assert part in written
    grid = next(iter(run_dir.glob("wandb/*/files/media/images/samples_*.png")))
    assert grid.read_bytes() == (run_dir / "samples" / "alignment-000001.png").read_bytes()


@pytest.mark.usefixtures("without_wandb_settings")
def test_weights_and_biases_without_a_key(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "wandb"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: wandb: No API key configured")
    assert said.count("\n") == 1


def test_trackio(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run_dir / "trackio"))  # read at the import
    pytest.importorskip("trackio", reason="trackio is not installed")
    send_twice(run_dir, TrackerKind.TRACKIO, capsys)
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("rtdmd")
    logs = SQLiteStorage.get_logs("rtdmd", run.name)
    assert [(log["step"], log["reward/hps"]) for log in logs if "reward/hps" in log] == [(3, 0.25), (4, 0.5), (5, 0.75)]
    assert run.config["cold_start.iterations"] == "2"


def test_mlflow(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (run_dir / "mlruns").as_uri())
    send_twice(run_dir, TrackerKind.MLFLOW, capsys)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("rtdmd")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["cold_start.iterations"] == "2"
    history = client.get_metric_history(run.info.run_id, "reward/hps")
    assert [(metric.step, metric.value) for metric in history] == [(3, 0.25), (4, 0.5), (5, 0.75)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"policies.md", "samples"}


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "find_spec", lambda _: None)
    require_installed([])
    with pytest.raises(ConfigError, match=r"trackers\.kinds: wandb: the package wandb is not installed: pip install"):
        require_installed([TrackerKind.WANDB])


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases leaves a folder `wandb` where it runs."""
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="the package mlflow is not installed"):
        require_installed([TrackerKind.MLFLOW])


def test_a_tracker_is_named_once() -> None:
    with pytest.raises(ValueError, match="name each tracker once"):
        tracked_config(kinds=["wandb", "wandb"])


def test_a_directory_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "tensorboard"]) == 2
    assert "no such run file" in capsys.readouterr().err


def test_the_project_may_be_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projects: list[str] = []
    monkeypatch.setattr(Feed, "send", lambda feed: projects.append(feed._config.trackers.project) or 0)
    monkeypatch.setattr("learner.tools.track.require_installed", lambda _: None)
    assert main([str(run_dir), "mlflow", "--project", "mine"]) == 0
    assert projects == ["mine"]
