"""Pictures of the panels: what Prometheus returns becomes curves, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from deploy.grafana import pictures
from deploy.grafana.panels import Panel
from deploy.grafana.pictures import Curve, curves, main, page

PANEL = Panel("Workers", "By state.", {'x{run=~"$run"}': "{{run}} {{state}} {{gone}}"}, stacked=True)


def test_series_become_curves_with_their_legends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []
    labels = {"run": "a", "state": "ready"}
    series = [
        {"metric": labels, "values": [[1.0, "2"], [2.0, "NaN"], [3.0, "4"]]},
        {"metric": {}, "values": [[1.0, "NaN"]]},
    ]

    def get(url: str, params: dict[str, str], timeout: float) -> httpx.Response:
        asked.append(params)
        return httpx.Response(200, json={"data": {"result": series}}, request=httpx.Request("GET", url))

    monkeypatch.setattr(pictures.httpx, "get", get)
    assert curves("http://x", PANEL, 0.0, 400.0, "a.*") == [Curve("a ready", [(1.0, 2.0), (3.0, 4.0)])]
    assert asked[0]["query"] == 'x{run=~"a.*"}'
    assert asked[0]["step"] == "2.000"


def test_stacked_curves_lie_on_top_of_each_other() -> None:
    found = [Curve("ready", [(1.0, 2.0), (2.0, 2.0)]), Curve("lost", [(2.0, 1.0)])]
    assert pictures._stacked(found)[1].points == [(2.0, 3.0)]
    html = page("service", [(PANEL, found)], 0.0, 60.0)
    assert html.count("<polyline") == 2
    assert "lost 1</span>" in html  # the legend has the value of the curve itself


def test_a_panel_without_data_says_why() -> None:
    quiet = Panel("Drops", "By cause.", {"y": ""}, needs_fault=True)
    html = page("rewards", [(PANEL, []), (quiet, [])], 0.0, 60.0)
    assert "no data: nothing has failed" in html
    assert html.count(">no data<") == 1


def test_a_prometheus_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prometheus", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: --prometheus http://127.0.0.1:9: ")


def test_a_machine_without_chromium_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pictures.shutil, "which", lambda _: None)
    with pytest.raises(pictures.NoPictureError, match="chromium is not installed: apt-get install chromium"):
        pictures.draw("", 1, tmp_path / "a.png")
