"""Copies of a run's state elsewhere, on fsspec's real file systems: a folder and memory."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from common.console_stream import LOG
from common.errors import CheckpointError, ConfigError
from common.types import Position, Stage
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.driver import run_copies
from learner.driver.run_copies import RunCopies, check_copies, copied_run, fetch_run, require_own_copies


@pytest.fixture(params=["folder", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    names = {"folder": str(tmp_path / "away"), "file": f"file://{tmp_path}/away", "memory": f"memory://{uuid.uuid4()}"}
    return names[request.param]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run in its tenth iteration."""
    folder = tmp_path / "run"
    (folder / "samples/policies").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("a line\n")
    (folder / "samples/policies/cold_start.json").write_text("{}")
    (folder / "samples/alignment-000005.png").write_bytes(b"not copied")
    for iteration in (5, 10):
        write(folder, iteration)
    return folder


def write(run_dir: Path, iteration: int) -> Path:
    state = {"weight": torch.full((3,), float(iteration))}
    return CheckpointStore.of_run(run_dir).save(Position(Stage.ALIGNMENT, iteration), state, {})


def listed(url: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return sorted(path.removeprefix(f"{root}/") for path in files.find(root))


def test_a_machine_without_the_run_gets_its_newest_checkpoint_and_files(
    url: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunCopies(url).push(run_dir)
    other = tmp_path / "other"
    fetch_run(url, other)
    newest = CheckpointStore.of_run(other).latest()
    assert newest is not None
    assert newest.name == "alignment-000010"
    assert torch.equal(Checkpoint.open(newest).state()["weight"], torch.full((3,), 10.0))
    assert (other / "metrics.jsonl").read_text() == "a line\n"
    found = sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    state = [f"checkpoints/alignment-000010/{name}" for name in ("checkpoint.json", "state.safetensors")]
    assert found == [*state, "copy_id.txt", "metrics.jsonl", "samples/policies/cold_start.json"]
    assert capsys.readouterr().err.startswith("checkpoint.copy_to: alignment-000010 was fetched from ")


def test_the_copies_follow_the_run(url: str, run_dir: Path) -> None:
    copies = RunCopies(url)
    copies.push(run_dir)
    (run_dir / "metrics.jsonl").write_text("a line\nanother\n")
    write(run_dir, 15)
    CheckpointStore.of_run(run_dir).prune(Stage.ALIGNMENT, keep=1)
    copies.push(run_dir)
    state = [f"checkpoints/alignment-000015/{name}" for name in ("checkpoint.json", "state.safetensors")]
    assert listed(url) == [*state, "copy_id.txt", "metrics.jsonl", "samples/policies/cold_start.json"]
    files, root = fsspec.core.url_to_fs(url)
    assert files.cat_file(f"{root}/metrics.jsonl") == b"a line\nanother\n"


def test_a_checkpoint_that_was_copied_in_part_does_not_count(url: str, run_dir: Path, tmp_path: Path) -> None:
    RunCopies(url).push(run_dir)
    files, root = fsspec.core.url_to_fs(url)
    files.rm(f"{root}/checkpoints/alignment-000010/checkpoint.json")
    fetch_run(url, tmp_path / "other")
    assert CheckpointStore.of_run(tmp_path / "other").iterations(Stage.ALIGNMENT) == [5]


def test_a_damaged_copy_is_passed_over_unless_all_are(url: str, run_dir: Path, tmp_path: Path) -> None:
    RunCopies(url).push(run_dir)
    files, root = fsspec.core.url_to_fs(url)
    for iteration, fetched in ((10, [5]), (5, None)):
        files.pipe_file(f"{root}/checkpoints/alignment-{iteration:06d}/state.safetensors", b"damaged")
        other = tmp_path / f"other-{iteration}"
        if fetched is None:
            with pytest.raises(CheckpointError, match=r"alignment-000010.* is damaged: its hash differs"):
                fetch_run(url, other)
        else:
            fetch_run(url, other)
            assert CheckpointStore.of_run(other).iterations(Stage.ALIGNMENT) == fetched


def test_only_files_of_a_run_are_fetched(run_dir: Path, tmp_path: Path) -> None:
    """A foreign file among the copies does not reach the machine."""
    url = str(tmp_path / "away")
    RunCopies(url).push(run_dir)
    for name in ("config.yaml", "samples/policies/deeper/file", "lora/adapter.safetensors"):
        path = tmp_path / "away" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("foreign")
    fetch_run(url, tmp_path / "other")
    assert not any((tmp_path / "other" / name).exists() for name in ("config.yaml", "lora", "samples/policies/deeper"))


def test_the_copies_of_another_run_are_left_alone(url: str, run_dir: Path, tmp_path: Path) -> None:
    """A new run with the same URL would remove the checkpoints of the former one there."""
    RunCopies(url).push(run_dir)
    before = listed(url)
    other = tmp_path / "other"
    write(other, 5)
    refusal = "has the copies of another run: name another folder, or continue that run with --resume"
    with pytest.raises(ConfigError, match=refusal):
        require_own_copies(url, other)
    with pytest.raises(ConfigError, match=refusal):
        RunCopies(url).push(other)
    assert listed(url) == before
    require_own_copies(url, run_dir)
    fetch_run(url, tmp_path / "third")
    require_own_copies(url, tmp_path / "third")


def test_a_checkpoint_that_the_run_removes_meanwhile_is_no_error(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, put = str(tmp_path / "away"), RunCopies._put

    def put_slowly(self: RunCopies, path: Path, name: str) -> None:
        put(self, path, name)
        if name.endswith("alignment-000005/state.safetensors"):
            CheckpointStore.of_run(run_dir).prune(Stage.ALIGNMENT, keep=1)

    monkeypatch.setattr(RunCopies, "_put", put_slowly)
    RunCopies(url).push(run_dir)
    assert [name for name in listed(url) if "000005" in name] == []
    assert "checkpoints/alignment-000010/checkpoint.json" in listed(url)


def test_without_copies_nothing_is_fetched(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch_run(url, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "nowhere://bucket/run",
            "copy_to: nowhere://bucket/run: Protocol not known: nowhere.*name a folder",
        ),
        ("s3://bucket/run", r"checkpoint.copy_to: s3://bucket/run: .*pip install 'rtdmd\[remote\]'"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=message):
        RunCopies(url)


def test_a_start_tries_to_write(url: str, tmp_path: Path) -> None:
    check_copies(url)
    assert listed(url) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"checkpoint.copy_to: {tmp_path}/file/run cannot be written: "):
        check_copies(f"{tmp_path}/file/run")


def test_the_run_waits_at_its_end_for_the_last_copy(url: str, run_dir: Path) -> None:
    with copied_run(url, run_dir) as copy:
        copy()
        (run_dir / "summary.json").write_text("{}")
    assert "summary.json" in listed(url)
    assert "checkpoints/alignment-000010/checkpoint.json" in listed(url)


def test_a_copy_that_fails_is_one_warning_and_tried_again(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries, tried = [OSError("throttled"), OSError("throttled"), None], threading.Semaphore(0)

    def push(self: RunCopies, _: Path) -> None:
        error = tries.pop(0)
        tried.release()
        if error is not None:
            raise error

    monkeypatch.setattr(RunCopies, "push", push)
    url = str(tmp_path / "away")
    with caplog.at_level(logging.WARNING, LOG.name), copied_run(url, run_dir) as copy:
        for _ in range(2):
            copy()
            assert tried.acquire(timeout=60)
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}: a copy failed: throttled; tried again after the next checkpoint",
        f"{url}: the newest checkpoint could be copied",
    ]


def test_a_copy_that_hangs_does_not_keep_the_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(run_copies, "LAST_COPY_S", 0.05)
    monkeypatch.setattr(RunCopies, "push", lambda *_: released.wait(60))
    with caplog.at_level(logging.WARNING, LOG.name), copied_run(str(tmp_path / "away"), run_dir) as copy:
        copy()
    released.set()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'away'}: the last copy has taken 0.05 s: the run ends without it"
    ]


def test_without_a_url_nothing_is_copied(run_dir: Path) -> None:
    before = sorted(os.listdir(run_dir))
    with copied_run(None, run_dir) as copy:
        copy()
    assert sorted(os.listdir(run_dir)) == before


def test_what_failed_to_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> bool:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "exists", away)
    with pytest.raises(ConfigError, match=f"checkpoint.copy_to: {tmp_path} cannot be reached: Forbidden"):
        RunCopies(str(tmp_path))
