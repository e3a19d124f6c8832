"""Kept groups: written, read, cut off by a resumed run, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import RtdmdError
from common.types import Position, Stage
from learner.records.group_files import FOLDER, cut_groups, kept_names, read_groups
from tests.helpers.run_directory import PROMPTS, write_group


def test_groups_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_group(tmp_path, 10)
    kept = read_groups(tmp_path, "alignment-000010")
    assert (kept.stage, kept.iteration, kept.policy_steps, kept.final_step) == ("alignment", 10, [0], True)
    assert [group.prompt for group in kept.groups] == list(PROMPTS)
    first = kept.groups[0]
    assert first.advantages == [-1.5, -0.5, 0.5, 1.5]
    assert first.trained == [True, True, True, False]
    assert first.scores["hps"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (tmp_path / FOLDER / first.strip).is_file()


def test_a_resumed_run_removes_what_it_will_repeat(tmp_path: Path) -> None:
    for iteration in (0, 10, 20):
        write_group(tmp_path, iteration)
    foreign = tmp_path / FOLDER / "notes.txt"
    foreign.write_text("mine", encoding="utf-8")
    cut_groups(tmp_path, Position(Stage.ALIGNMENT, 10))
    assert kept_names(tmp_path) == ["alignment-000000"]
    assert len(list((tmp_path / FOLDER).glob("*.png"))) == len(PROMPTS)
    assert foreign.exists()
    cut_groups(tmp_path / "nowhere", Position(Stage.ALIGNMENT, 0))


@pytest.mark.parametrize("name", ["alignment-000099", "../../config", "", "alignment-10"])
def test_an_iteration_that_is_not_kept_is_named(tmp_path: Path, name: str) -> None:
    write_group(tmp_path, 10)
    with pytest.raises(RtdmdError, match="no groups of this iteration are kept"):
        read_groups(tmp_path, name)


@pytest.mark.parametrize(
    "change", [{"strip": "../../../etc/passwd"}, {"advantages": [1.0]}, {"scores": {"hps": ["high"] * 4}}]
)
def test_damage_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    write_group(tmp_path, 0)
    path = tmp_path / FOLDER / "alignment-000000.json"
    record = json.loads(path.read_text())
    record["groups"][0] |= change
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RtdmdError, match=r"alignment-000000\.json: not what a run writes"):
        read_groups(tmp_path, "alignment-000000")
