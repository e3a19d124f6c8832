"""Reading what a run leaves: a file that grows, is torn, or is replaced by a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import RtdmdError
from learner.records.run_files import MetricsFile, read_metrics, read_run
from tests.helpers.run_directory import POLICIES, record, write_run


def iterations(file: MetricsFile) -> list[int]:
    return [one.iteration for one in file.records()]


def test_a_growing_file_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = record("alignment", 1, loss=2.0)
    path.write_text(record("alignment", 0, loss=1.0) + "\n" + line[:20], encoding="utf-8")
    file = MetricsFile(path)
    assert iterations(file) == [0]
    with path.open("a", encoding="utf-8") as more:
        more.write(line[20:] + "\n" + record("alignment", 2))
    assert iterations(file) == [0, 1, 2]
    assert file.records()[1].metrics == {"loss": 2.0}


def test_a_resumed_run_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(record("alignment", i) + "\n" for i in range(5)), encoding="utf-8")
    file = MetricsFile(path)
    assert iterations(file) == [0, 1, 2, 3, 4]
    shorter = tmp_path / "new"
    shorter.write_text(record("alignment", 0, loss=9.0) + "\n", encoding="utf-8")
    shorter.replace(path)
    assert [one.metrics for one in file.records()] == [{"loss": 9.0}]


def test_a_damaged_line_is_named_by_its_number_in_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(record("alignment", 0) + "\n", encoding="utf-8")
    file = MetricsFile(path)
    file.records()
    with path.open("a", encoding="utf-8") as more:
        more.write("nonsense\n" + record("alignment", 1) + "\n")
    with pytest.raises(RtdmdError, match="line 2 is not a metrics record"):
        file.records()


def test_a_time_must_be_a_number(tmp_path: Path) -> None:
    line = json.loads(record("alignment", 0)) | {"time": "noon"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + record("alignment", 1), encoding="utf-8")
    with pytest.raises(RtdmdError, match="line 1"):
        read_metrics(tmp_path)


def test_policies_have_their_scores_by_prompt(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert list(run.policies) == list(POLICIES)
    rtdmd = run.policies["rtdmd"]
    assert rtdmd.by_prompt["gold"][0] == pytest.approx(0.7)
    assert len(rtdmd.by_prompt["diversity"]) == 12
    assert rtdmd.basis == ("abc", "2", "0")
    assert run.finished
    assert run.gallery[0].prompt == "big red circle on white"


def test_without_a_summary_the_policies_so_far_are_in_the_order_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", finished=False))
    assert list(run.policies) == ["teacher_28", "teacher_4", "cold_start", "rtdmd"]
    assert not run.finished


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    (directory / "samples/policies/rtdmd.json").write_text('{"scores": [{"gold": []}]}', encoding="utf-8")
    with pytest.raises(RtdmdError, match=r"rtdmd\.json: not what a run writes"):
        read_run(directory)
