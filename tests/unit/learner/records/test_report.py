"""The report is one file that stands alone and shows what the run left."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from common.errors import RtdmdError
from learner.records.charts import HEIGHT, LEFT, Frame, line_chart, moving_average, round_ticks
from learner.records.report import main, write_report
from learner.records.run_files import policy_label
from tests.helpers.html_page import Page


def record(stage: str, iteration: int, kind: str = "train", **metrics: float) -> str:
    return json.dumps(
        {"stage": stage, "iteration": iteration, "kind": kind, "metrics": metrics, "seconds": {"rollout": 1.5}}
    )


def write_run(directory: Path, lines: list[str], **files: Any) -> Path:
    (directory / "samples").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, content in files.items():
        path = directory / {"summary": "summary.json", "gallery": "samples/gallery.json"}[name]
        path.write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_a_finished_run_is_shown_whole(tmp_path: Path) -> None:
    picture = {"image": "a.png", "scores": {"hps": 0.2712345}}
    directory = write_run(
        tmp_path / "demo",
        [record("cold_start", 0, loss=1.0), record("alignment", 0, "evaluation", gold=0.75), '{"torn'],
        summary={
            "policies": {"teacher_28": {"gold": 0.785}, "rtdmd": {"gold": 0.91234}},
            "seconds": {"total": 1234.5},
            "run": {"seed": 3},
        },
        gallery=[{"prompt": "<script>alert(1)</script> & co", "policies": {"rtdmd": picture}}],
    )
    Image.new("RGB", (8, 8), "red").save(directory / "samples/a.png")
    (directory / "config.yaml").write_text("run: {name: <demo>}\n", encoding="utf-8")

    path = write_report(directory)

    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == directory / "report.html"
    assert page.open == []
    assert page.tags.count("script") == 1  # our own; the prompt is text
    assert "script-src 'sha256-" in text
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources] == [
        (directory / "samples/a.png").read_bytes()
    ]
    for shown in ("<script>alert(1)</script> & co", "0.2712", "Teacher, 28 steps", "1,234.5", "<demo>", "seed 3"):
        assert shown in page.text
    assert "0.9123" in page.text
    assert 'class="best"' not in text  # no scores by prompt: the difference may be noise
    assert text.count("<svg") == 2


def test_an_interrupted_run_shows_what_there_is(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "cut", [record("cold_start", 0, loss=1.0)])
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    assert "the run has not finished" in page.text
    assert page.tags.count("svg") == 1


def test_a_repeated_iteration_counts_once(tmp_path: Path) -> None:
    lines = [record("alignment", 0, loss=1.0), record("alignment", 1, loss=7.0), record("alignment", 1, loss=3.0)]
    directory = write_run(tmp_path / "resumed", lines)
    text = write_report(directory).read_text(encoding="utf-8")
    assert text.count("<circle") == 2
    assert "<td>alignment: rollout</td><td>3.0</td>" in text


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        *(
            ([line, record("alignment", 0)], {}, "metrics.jsonl: line 1 is not a metrics record")
            for line in (
                "nonsense",
                "null",
                '{"stage": "alignment", "iteration": 0, "kind": "train"}',
                '{"stage": "alignment", "iteration": null, "kind": "train", "metrics": {}}',
                '{"stage": "alignment", "iteration": 0, "kind": "train", "metrics": {"x": null}}',
            )
        ),
        ([record("alignment", 0)], {"summary": []}, "summary.json: not what a run writes .*restore it, or remove it"),
        ([record("alignment", 0)], {"summary": {"policies": {"rtdmd": {"hps": None}}}}, "summary.json: not what a run"),
        ([record("alignment", 0)], {"gallery": [{"prompt": "a"}]}, "gallery.json: not what a run writes"),
        (
            [record("alignment", 0)],
            {"gallery": [{"prompt": "p", "policies": {"rtdmd": {"image": "gone.png", "scores": {}}}}]},
            r"gone\.png: named in gallery\.json, but cannot be read",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, lines: list[str], files: dict[str, Any], expected: str) -> None:
    directory = write_run(tmp_path / "damaged", lines, **files)
    with pytest.raises(RtdmdError, match=expected):
        write_report(directory)


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RtdmdError, match="is not the directory of a run"):
        write_report(tmp_path)


def test_every_teacher_of_the_summary_is_a_dashed_line(tmp_path: Path) -> None:
    policies = {"teacher_6": {"gold": 0.5}, "teacher_3": {"gold": 0.25}, "rtdmd": {"gold": 0.75}}
    lines = [record("alignment", number, "evaluation", gold=0.1 * number) for number in (1, 2)]
    text = write_report(write_run(tmp_path / "run", lines, summary={"policies": policies})).read_text(encoding="utf-8")
    chart = text[text.index("<svg") : text.index("</svg>")]
    assert "Teacher, 6 steps" in chart
    assert "Teacher, 3 steps" in chart
    assert "RTDMD" not in chart


def test_the_command_writes_a_report_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path / "run", [record("cold_start", 0, loss=1.0)])
    assert main([str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory / 'report.html'}\n"
    assert (directory / "report.html").is_file()
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_policies_have_readable_names() -> None:
    assert [policy_label(name) for name in ("teacher_4", "cold_start", "rtdmd", "my_own")] == [
        "Teacher, 4 steps",
        "Cold start",
        "RTDMD",
        "my own",
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.0, 99.0, [0.0, 50.0]), (0.55, 0.87, [0.6, 0.7, 0.8])],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_a_frame_maps_the_data_into_the_chart() -> None:
    frame = Frame.around([(0.0, 1.0), (10.0, 3.0)], levels=[5.0])
    assert frame.x(0.0) == LEFT
    assert 0 < frame.y(5.0) < frame.y(3.0) < frame.y(1.0) < HEIGHT
    flat = Frame.around([(2.0, 4.0)], levels=[])
    assert flat.y_low < 4.0 < flat.y_high
    assert flat.x_low < 2.0 < flat.x_high


def test_a_moving_average_by_hand() -> None:
    points = [(0.0, 0.0), (1.0, 3.0), (2.0, 6.0), (3.0, 0.0)]
    assert moving_average(points, 3) == [(0.0, 1.5), (1.0, 3.0), (2.0, 3.0), (3.0, 3.0)]


def test_a_chart_is_well_formed_and_leaves_out_what_is_not_finite() -> None:
    chart = line_chart(
        "a < b", {"": [(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0)]}, {"teacher & co": 1.5, "none": float("inf")}
    )
    root = ElementTree.fromstring(chart)
    texts = [element.text for element in root.iter("text")]
    assert "a < b" in texts
    assert "teacher & co" in texts
    assert "none" not in texts
    assert len(list(root.iter("circle"))) == 2
    assert "nothing measured" in line_chart("empty", {"": [(0.0, float("nan"))]})
