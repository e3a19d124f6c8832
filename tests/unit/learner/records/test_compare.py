"""A comparison is one file with the tables, curves and pictures of several runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from learner.records.compare import main
from tests.helpers.html_page import Page
from tests.helpers.run_directory import write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [str(write_run(tmp_path / "plain")), str(write_run(tmp_path / "better", gain=0.2))]


def test_runs_are_side_by_side(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.html"
    assert main([*runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources)
    for shown in ("plain: RTDMD", "better: RTDMD", "plain: Teacher, 28 steps", "<script>alert(1)</script> & co"):
        assert shown in page.text
    assert "better: Teacher" not in page.text  # the same teacher on the same noise stands once
    assert re.search(r"better: RTDMD</td><td class=\"best\">0\.90", text)
    chart = text[text.index("reward/hps") : text.index("</svg>", text.index("reward/hps"))]
    assert {"series-0", "series-1"} <= set(re.findall(r"series-\d", chart))
    assert "nothing of its own" in page.text  # their configurations are equal
    assert page.text.count("Teacher, 28 steps") == 1 + 2  # the table, and a picture for each prompt


def test_runs_on_other_prompts_are_pointed_out(tmp_path: Path, runs: list[str]) -> None:
    for path in Path(runs[1], "samples", "policies").glob("*.json"):
        path.write_text(path.read_text().replace('"abc"', '"other"'), encoding="utf-8")
    out = tmp_path / "out.html"
    assert main([*runs, "--out", str(out)]) == 0
    assert "different prompts, numbers of images or seeds" in out.read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_named(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([runs[0], runs[0], "--out", str(tmp_path / "out.html")]) == 2
    assert "name at least two different run directories" in capsys.readouterr().err
    assert main([runs[0], str(tmp_path), "--out", str(tmp_path / "out.html")]) == 1
    assert "is not the directory of a run" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()
