"""The ledger: one line per group, also after a resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from common.group_ends import GroupEnd, GroupOutcome
from common.types import Position, Stage
from learner.driver.ledger import LEDGER, Ledger, cut_ledger


def ends(iteration: int) -> list[GroupEnd]:
    return [
        GroupEnd(iteration, 4, GroupOutcome.TRAINED, "host:1", 1),
        GroupEnd(iteration, 2, GroupOutcome.REWARD_FAILED, "host:1", 2, "hps:timeout"),
    ]


def lines(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / LEDGER).read_text().splitlines()]


def test_every_group_has_a_line(tmp_path: Path) -> None:
    Ledger(tmp_path).record(ends(0))
    assert lines(tmp_path) == [
        {"iteration": 0, "prompt": 4, "outcome": "trained", "worker": "host:1", "attempts": 1, "cause": ""},
        {
            "iteration": 0,
            "prompt": 2,
            "outcome": "reward_failed",
            "worker": "host:1",
            "attempts": 2,
            "cause": "hps:timeout",
        },
    ]


def test_a_resumed_run_has_one_line_per_group(tmp_path: Path) -> None:
    """It died after iteration 4, in a line, and goes on from the checkpoint after 2 iterations."""
    ledger = Ledger(tmp_path)
    for iteration in range(5):
        ledger.record(ends(iteration))
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"iteration": 1, "pro')
    cut_ledger(tmp_path, Position(Stage.ALIGNMENT, 2))
    for iteration in range(2, 4):
        Ledger(tmp_path).record(ends(iteration))
    counts = Counter((line["iteration"], line["prompt"]) for line in lines(tmp_path))
    assert counts == dict.fromkeys(((iteration, prompt) for iteration in range(4) for prompt in (4, 2)), 1)


def test_a_run_that_resumes_in_stage_1_has_no_groups_yet(tmp_path: Path) -> None:
    cut_ledger(tmp_path, Position(Stage.COLD_START, 9))
    assert not (tmp_path / LEDGER).exists()
    Ledger(tmp_path).record(ends(3))
    cut_ledger(tmp_path, Position(Stage.COLD_START, 9))
    assert (tmp_path / LEDGER).read_text() == ""
