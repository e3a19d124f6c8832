"""Ends of runs that are equal, or differ in one thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.types import Position, Stage
from learner.chaos.comparison import differences
from learner.checkpoint import CheckpointStore


def metric(iteration: int, value: float, seconds: float = 1.0) -> str:
    line = {"stage": "alignment", "iteration": iteration, "kind": "train", "metrics": {"reward": value}}
    return json.dumps(line | {"seconds": {"step": seconds}, "time": seconds}) + "\n"


def end(iteration: int, prompt: int, outcome: str = "trained") -> str:
    return json.dumps({"iteration": iteration, "prompt": prompt, "outcome": outcome, "worker": str(prompt)}) + "\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(metric(0, 0.5) + metric(1, 0.75))
    (folder / "ledger.jsonl").write_text(end(0, 4) + end(1, 2))
    CheckpointStore.of_run(folder).save(Position(Stage.ALIGNMENT, 2), {"weight": torch.ones(2)}, {})
    return folder


def slower(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(metric(0, 0.5, 7.0) + metric(1, 0.75, 8.0))


def other_value(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(metric(0, 0.5) + metric(1, 0.7500001))


def shorter(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(metric(0, 0.5))


def dropped(run_dir: Path) -> None:
    (run_dir / "ledger.jsonl").write_text(end(0, 4) + end(1, 2, "dropped"))


def twice(run_dir: Path) -> None:
    (run_dir / "ledger.jsonl").write_text(end(0, 4) + end(1, 2) + end(1, 2))


def other_state(run_dir: Path) -> None:
    CheckpointStore.of_run(run_dir).save(Position(Stage.ALIGNMENT, 2), {"weight": torch.zeros(2)}, {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (slower, []),
        (other_value, ["metrics.jsonl differs: first in ('alignment', 1, 'train')"]),
        (shorter, ["metrics.jsonl differs: 1 lines for 2"]),
        (dropped, ["ledger.jsonl differs"]),
        (twice, ["ledger.jsonl differs", "ledger.jsonl has 1 groups with several ends, first (1, 2)"]),
        (other_state, ["the last checkpoints differ"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_differs_is_named(change: Callable[[Path], None], told: list[str], run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    change(other)
    assert differences(other, run_dir) == told
