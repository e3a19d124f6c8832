"""Checkpoints of a run whose disk refuses them for a while, and the best one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.config.run import CheckpointConfig
from common.console_stream import LOG
from common.errors import CheckpointError
from common.types import Position, Stage
from learner.checkpoint import CheckpointStore
from learner.driver import checkpoint_writer
from learner.driver.checkpoint_writer import CheckpointWriter
from learner.records.line_file import LineFile

FULL = "cannot write a checkpoint: /run: No space left on device"


class Learner:
    """Saves empty checkpoints; it is refused as often as it is told."""

    def __init__(self) -> None:
        self.refusals = 0

    def save(self, run_dir: Path, position: Position, settings: Mapping[str, Any]) -> Path:
        if self.refusals:
            self.refusals -= 1
            raise CheckpointError(FULL)
        folder = CheckpointStore.of_run(run_dir).root / position.directory
        folder.mkdir(parents=True)
        return folder


class Told:
    """The tracker's messages and checkpoints."""

    def __init__(self, run_dir: Path) -> None:
        self.lines = LineFile(run_dir / "metrics.jsonl")
        self.lines.append("")
        self.lines.path.touch()
        self.messages: list[str] = []
        self.written: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def checkpoint(self, folder: Path) -> None:
        self.written.append(folder.name)


@pytest.fixture
def learner() -> Learner:
    return Learner()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits so far; the clock moves by them alone."""
    slept: list[float] = []
    monkeypatch.setattr(checkpoint_writer.time, "sleep", slept.append)
    monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: sum(slept))
    return slept


def writer_of(run_dir: Path, learner: Any, **options: Any) -> tuple[CheckpointWriter, Told]:
    tracker: Any = Told(run_dir)
    config = CheckpointConfig(**{"every": 4, **options})
    return CheckpointWriter(config, run_dir, learner, tracker, {}, [tracker.lines], lambda: None), tracker


def after(iteration: int) -> Position:
    return Position(Stage.ALIGNMENT, iteration)


def test_a_refused_checkpoint_is_tried_again_after_every_iteration(
    tmp_path: Path, learner: Learner, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    writer, told = writer_of(tmp_path, learner)
    learner.refusals = 2
    with caplog.at_level(logging.WARNING, LOG.name):
        for iteration in range(1, 8):
            writer.periodic(after(iteration), [])
    assert told.written == ["alignment-000006"]
    assert told.messages == ["the checkpoint alignment-000006 could be written"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{FULL}; training goes on, and it is tried again after every iteration"
    ]
    assert waits == []


def test_when_the_next_one_is_due_the_run_waits(tmp_path: Path, learner: Learner, waits: list[float]) -> None:
    writer, told = writer_of(tmp_path, learner)
    learner.refusals = 7
    for iteration in range(1, 9):
        writer.periodic(after(iteration), [])
    assert told.written == ["alignment-000008"]
    assert waits == [checkpoint_writer.RETRY_S] * 3


def test_a_disk_that_stays_full_ends_the_run(tmp_path: Path, learner: Learner, waits: list[float]) -> None:
    writer, _ = writer_of(tmp_path, learner)
    learner.refusals = 10_000
    with pytest.raises(CheckpointError, match=r"No space left on device; continue with --resume"):
        writer.write(after(3))
    assert sum(waits) == checkpoint_writer.PATIENCE_S


def test_no_checkpoint_is_ahead_of_the_metrics(
    tmp_path: Path, learner: Learner, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    writer, told = writer_of(tmp_path, learner)
    told.lines.path.unlink()
    told.lines.path.mkdir()  # refuses every line
    told.lines.append("a line\n")
    writer.periodic(after(4), [])
    assert told.written == []
    told.lines.path.rmdir()
    writer.periodic(after(5), [])
    assert told.written == ["alignment-000005"]
    assert told.lines.path.read_text() == "a line\n"


def test_the_best_evaluated_checkpoint_is_kept_and_named(tmp_path: Path, learner: Learner) -> None:
    writer, told = writer_of(tmp_path, learner, keep=1, best="gold")
    for iteration, gold in ((4, 0.5), (8, 0.75), (12, 0.25), (16, 0.75), (20, 0.5)):
        line = {"stage": "alignment", "iteration": iteration, "kind": "evaluation", "metrics": {"gold": gold}}
        told.lines.append(json.dumps(line) + "\n")
        writer.periodic(after(iteration), [])
    assert CheckpointStore.of_run(tmp_path).iterations(Stage.ALIGNMENT) == [16, 20]
    assert told.messages == [
        f"best checkpoint by gold so far: alignment-{iteration:06d} ({gold:.3f})"
        for iteration, gold in ((4, 0.5), (8, 0.75), (16, 0.75))
    ]


def test_without_an_evaluation_none_is_the_best(tmp_path: Path, learner: Learner) -> None:
    writer, told = writer_of(tmp_path, learner, keep=1, best="gold")
    for iteration in (4, 8):
        writer.periodic(after(iteration), [])
    assert CheckpointStore.of_run(tmp_path).iterations(Stage.ALIGNMENT) == [8]
    assert told.messages == []
