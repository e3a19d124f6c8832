"""Draws the panels of the dashboards from a running Prometheus, as PNG files, with headless Chromium.

python -m deploy.grafana.pictures --prometheus http://127.0.0.1:9090 --minutes 30 --out docs/images

Grafana draws the same data. These pictures are for machines without it, and for the documentation.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import httpx

from deploy.grafana.panels import DASHBOARDS, Panel

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 230, 58, 8, 24
PLOT = (WIDTH - LEFT - 8, HEIGHT - TOP - BOTTOM)
COLUMNS, LEGEND_LINES = 3, 6
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
STEPS = 200
STYLE = """body{font:13px sans-serif;margin:12px;background:#fff;color:#222;width:1440px}
h1{font-size:20px;margin:4px 0 10px}.grid{display:grid;grid-template-columns:repeat(3,1fr);gap:10px}
.panel{border:1px solid #ccc;border-radius:4px;padding:6px 8px;height:352px;overflow:hidden}h2{font-size:14px;margin:0}
p{margin:1px 0 4px;color:#666;font-size:11px;height:26px;overflow:hidden}.legend{font-size:11px;line-height:1.25}
.legend b{display:inline-block;width:9px;height:9px;margin-right:4px}text{font:10px sans-serif;fill:#555}
td{padding:1px 10px 1px 0}td+td{text-align:right}"""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One series with its legend; its points are (seconds since 1970, value)."""

    legend: str
    points: list[Point]


class NoPictureError(Exception):
    """Prometheus does not answer, or there is no Chromium."""


def curves(prometheus: str, panel: Panel, start: float, end: float, run: str) -> list[Curve]:
    """The series of a panel between two times. Points that are not finite are left out."""
    found = []
    for expression, legend in panel.curves.items():
        query = {
            "query": expression.replace("$run", run),
            "start": f"{start:.3f}",
            "end": f"{end:.3f}",
            "step": f"{max(1.0, (end - start) / STEPS):.3f}",
        }
        try:
            answer = httpx.get(f"{prometheus}/api/v1/query_range", params=query, timeout=60).raise_for_status().json()
        except httpx.HTTPError as error:
            raise NoPictureError(f"--prometheus {prometheus}: {error}: is Prometheus running there?") from error
        for series in answer["data"]["result"]:
            points = [(float(at), float(value)) for at, value in series["values"]]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                found.append(Curve(_legend(legend, series["metric"]), points))
    return found


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name[1], ""), template).strip()


def page(name: str, drawn: Sequence[tuple[Panel, list[Curve]]], start: float, end: float) -> str:
    """One dashboard as HTML."""
    cells = [
        f'<div class="panel"><h2>{escape(panel.title)}</h2><p>{escape(panel.about)}</p>'
        f"{_numbers(found) if panel.kind == 'stat' else _lines(panel, found, start, end)}</div>"
        for panel, found in drawn
    ]
    return (
        f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><h1>RTDMD {name}</h1>'
        f'<div class="grid">{"".join(cells)}</div>'
    )


def _numbers(found: list[Curve]) -> str:
    rows = [f"<tr><td>{escape(one.legend)}</td><td>{one.points[-1][1]:.4g}</td></tr>" for one in found[:16]]
    return f'<table class="legend">{"".join(rows)}</table>'


def _lines(panel: Panel, found: list[Curve], start: float, end: float) -> str:
    if not found:
        said = "no data: nothing has failed" if panel.needs_fault else "no data"
        return f'<svg width="{WIDTH}" height="{HEIGHT}"><text x="{WIDTH / 2}" y="{HEIGHT / 2}">{said}</text></svg>'
    shown = _stacked(found) if panel.stacked else found
    values = [value for one in shown for _, value in one.points]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0
    parts = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = TOP + PLOT[1] * (1 - tick / 4)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{PLOT[0]}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{_with_unit(value, panel.unit)}</text>')
        x, at = LEFT + PLOT[0] * tick / 4, (end - start) * tick / 4
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{at / 60:.1f} min</text>')
    for number, one in enumerate(shown):
        path = " ".join(
            f"{LEFT + PLOT[0] * (at - start) / (end - start):.1f},{TOP + PLOT[1] * (high - value) / (high - low):.1f}"
            for at, value in one.points
        )
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg>{_legend_list(found, panel.unit)}'


def _stacked(found: list[Curve]) -> list[Curve]:
    """Each curve on top of those before it."""
    below: dict[float, float] = {}
    stacked = []
    for one in found:
        points = [(at, value + below.get(at, 0.0)) for at, value in one.points]
        below |= dict(points)
        stacked.append(Curve(one.legend, points))
    return stacked


def _legend_list(found: list[Curve], unit: str) -> str:
    lines = [
        f'<span><b style="background:{COLOURS[number % len(COLOURS)]}"></b>{escape(one.legend)} '
        f"{_with_unit(one.points[-1][1], unit)}</span>"
        for number, one in enumerate(found)
    ]
    hidden = f" and {len(lines) - 2 * LEGEND_LINES} more" if len(lines) > 2 * LEGEND_LINES else ""
    return f'<div class="legend">{" &nbsp; ".join(lines[: 2 * LEGEND_LINES])}{hidden}</div>'


def _with_unit(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    return f"{value:.3g}" + {"s": " s", "ops": "/s"}.get(unit, "")


def draw(html: str, rows: int, png: Path) -> None:
    """Write a page as a PNG file."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise NoPictureError("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "page.html"
        source.write_text(html, encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--screenshot={png.absolute()}"]
        command += [f"--window-size=1470,{rows * 380 + 70}", source.as_uri()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana.pictures", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="where Prometheus answers")
    parser.add_argument("--minutes", type=float, default=60.0, help="the last so many minutes")
    parser.add_argument("--run", default=".*", help="regular expression of the runs' names")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of dashboard_NAME.png")
    options = parser.parse_args(arguments)
    end = time.time()
    start = end - 60 * options.minutes
    try:
        for name, panels in DASHBOARDS.items():
            drawn = [(panel, curves(options.prometheus, panel, start, end, options.run)) for panel in panels]
            png = options.out / f"dashboard_{name}.png"
            draw(page(name, drawn, start, end), math.ceil(len(panels) / COLUMNS), png)
            print(png)
    except NoPictureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
