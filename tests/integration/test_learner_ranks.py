"""Ranks of the learner: real processes that share every update through gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.training.batch_metrics import Totals
from learner.training.ranks import Ranks
from tests.helpers import rank_process
from tests.helpers.running_service import PROJECT_ROOT

DEADLINE = 180.0
GONE = "a rank of the learner is gone"


def start(pipeline: Path, out: Path, count: int, base: str, fault: str = "") -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.helpers.rank_process", str(pipeline), str(out)]
    return [
        subprocess.Popen(
            [*command, str(index), str(count), base, *filter(None, [fault])],
            cwd=PROJECT_ROOT,
            env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def outputs(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    ended = [process.communicate(timeout=DEADLINE) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def metrics_of(files: list[Path]) -> list[dict[str, float]]:
    """Of every update, from the totals of its ranks."""
    parts = []
    for file in files:
        totals = [Totals() for _ in json.loads(file.read_text())]
        for total, fields in zip(totals, json.loads(file.read_text()), strict=True):
            for name, values in fields.items():
                vars(total)[name].update(values)
        parts.append(totals)
    return [Totals.merged(update).values() for update in zip(*parts, strict=True)]


SLOW_BASES = [pytest.param(base, marks=pytest.mark.slow) for base in ("sharded", "surrogate")]


@pytest.mark.parametrize("base", ["whole", "recomputed", *SLOW_BASES])
def test_two_ranks_train_as_one_does(base: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    pair = start(tiny_pipeline, tmp_path, 2, base)
    held_alone = rank_process.train(tiny_pipeline, tmp_path, 0, 1, base)
    ended = outputs(pair)
    assert [status for status, *_ in ended] == [0, 0], ended
    assert sum(int(told) for _, told, _ in ended) == held_alone * (2 if base in ("whole", "surrogate") else 1)
    alone = load_file(tmp_path / "rank-0-of-1.safetensors")
    first, second = (load_file(tmp_path / f"rank-{index}-of-2.safetensors") for index in range(2))
    assert all(torch.equal(first[name], second[name]) for name in alone)
    weights = [name for name in alone if not name.startswith("optimizer/")]
    # AdamW divides by the root of a gradient's square: where that is rounding error itself, a step is arbitrary.
    assert max((first[name] - alone[name]).abs().max().item() for name in weights) < 1e-5
    one = metrics_of([tmp_path / "rank-0-of-1.json"])
    two = metrics_of([tmp_path / f"rank-{index}-of-2.json" for index in range(2)])
    assert len(one) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("base", "fault", "expected"),
    [
        ("whole", "error", "another rank of the learner failed in its update of the student"),
        pytest.param(
            "surrogate",
            "unmeasured",
            "another rank of the learner failed in the surrogate's groups",
            marks=pytest.mark.slow,
        ),
        pytest.param("sharded", "error", GONE, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_stops_the_others(
    base: str, fault: str, expected: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    (status, told, errors), (other_status, other_told, _) = outputs(start(tiny_pipeline, tmp_path, 2, base, fault))
    assert (status, other_status) == (1, 1), errors
    assert told.startswith(f"RankError: {expected}")
    assert other_told.startswith("RewardUnavailable")


@pytest.mark.parametrize("base", [pytest.param("whole", marks=pytest.mark.slow), "sharded"])
def test_a_rank_that_dies_stops_the_others(base: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    (status, told, errors), (other_status, *_) = outputs(start(tiny_pipeline, tmp_path, 2, base, "death"))
    assert other_status == -signal.SIGKILL
    assert status == 1, errors
    assert told.startswith(f"RankError: {GONE}")


@pytest.mark.parametrize(("total", "count"), [(7, 3), (2, 2), (16, 5), (1, 1)])
def test_shares_are_as_equal_as_can_be_and_cover_the_batch(total: int, count: int) -> None:
    shares = [range(total)[Ranks(index, count).share(total)] for index in range(count)]
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
