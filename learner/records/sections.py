"""Parts of the pages as HTML: the final table, curves and the gallery, for report, live page and comparison."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from common.errors import RtdmdError
from learner.metric_names import GROUP_ERROR
from learner.records.charts import SERIES_COLOURS, Point, line_chart
from learner.records.intervals import interval, winner
from learner.records.run_files import EVALUATION, TRAIN, GalleryRow, Picture, PolicyResult, Record, policy_label

SMALL_IMAGE_BYTES = 40_000  # about a 128 px PNG: such images are enlarged with hard edges
STAGES = ("alignment", "cold_start")

Source = Callable[[Path], tuple[str, bool]]
Curves = Mapping[tuple[str, str], Mapping[str, list[Point]]]
"""(stage, kind of record) -> metric -> its points."""


def policies_table(policies: Mapping[str, PolicyResult], labels: Mapping[str, str]) -> str:
    """Rows by policy, columns by metric, with 95 % intervals. The best value is marked only if it is beyond noise."""
    metrics = list(dict.fromkeys(name for result in policies.values() for name in result.metrics))
    best = {metric: winner(policies, metric) for metric in metrics}
    head = "".join(f"<th>{escape(metric)}</th>" for metric in metrics)
    rows = "".join(
        f"<tr><td>{labels[name]}</td>{''.join(_cell(result, metric, best[metric] == name) for metric in metrics)}</tr>"
        for name, result in policies.items()
    )
    return (
        '<p class="note">± is the 95 % confidence interval of the mean over prompts. ★ marks the best policy of a '
        "column if it is better than every other one by more than noise: the 95 % intervals of its differences exclude "
        "zero. Policies with the same prompts and noise are compared prompt by prompt.</p>"
        '<div class="card"><table><thead>'
        f"<tr><th>policy</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(result: PolicyResult, metric: str, best: bool) -> str:
    if metric not in result.metrics:
        return "<td>–</td>"
    by_prompt = result.by_prompt.get(metric, {})
    half = interval(list(by_prompt.values())).half_width if by_prompt else math.nan
    known = "" if math.isnan(half) else f' <span class="half">± {half:.2g}</span>'
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{shown(result.metrics[metric])}{known}</td>"


def curves_of(records: Sequence[Record]) -> Curves:
    """The points of every metric but the groups' errors, which only the watchdog needs."""
    curves: dict[tuple[str, str], dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, value in record.metrics.items():
            if not name.startswith(GROUP_ERROR):
                curves[record.stage, record.kind][name].append((record.iteration, value))
    return curves


def curves_section(runs: Mapping[str, Curves], policies: Mapping[str, PolicyResult]) -> str:
    """All curves, one line per run (label -> its curves); `policies` gives the teachers' dashed lines."""
    parts = []
    for stage in STAGES:
        for kind in (EVALUATION, TRAIN):
            by_run = {label: curves.get((stage, kind), {}) for label, curves in runs.items()}
            references = policies if kind == EVALUATION else {}
            parts.append(_charts(policy_label(stage), kind, by_run, references))
    note = "Thin: every iteration, or the mean of a few. Thick: moving average. Point at a curve to read it."
    if any(name.startswith("teacher_") for name in policies):
        note += " Dashed: the teacher in the final table."
    legend = f'<p class="note">{swatches(list(runs))}</p>' if len(runs) > 1 else ""
    return f'<h2 id="curves-title">Curves</h2><p class="note">{note}</p>{legend}{"".join(parts)}' if any(parts) else ""


def swatches(labels: Sequence[str]) -> str:
    """The colours of the lines in a legend."""
    return " &nbsp; ".join(f"{swatch(place)}{escape(label)}" for place, label in enumerate(labels))


def swatch(place: int) -> str:
    return f'<span class="swatch series-{place % SERIES_COLOURS}"></span>'


def _charts(
    stage: str, kind: str, runs: Mapping[str, Mapping[str, list[Point]]], references: Mapping[str, PolicyResult]
) -> str:
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    if not names:
        return ""
    charts = []
    for name in names:
        levels = {
            policy_label(policy): result.metrics[name]
            for policy, result in references.items()
            if policy.startswith("teacher_") and name in result.metrics
        }
        # A run without the metric keeps its place, so that its colour is the same in every chart.
        charts.append(line_chart(name, {label or name: curves.get(name, []) for label, curves in runs.items()}, levels))
    heading = f"{stage.capitalize()}: {'evaluation' if kind == EVALUATION else 'training'}, by iteration"
    return f'<h3>{escape(heading)}</h3><div class="charts">{"".join(charts)}</div>'


def gallery_rows(gallery: Sequence[GalleryRow], source: Source, label: Callable[[str], str] = policy_label) -> str:
    """The gallery as HTML: one card per prompt.

    `source` gives an image's URL and whether its pixels are few; `label` the title of a policy's picture.
    """
    return f'<div class="gallery">{"".join(_gallery_card(row, source, label) for row in gallery)}</div>'


def _gallery_card(row: GalleryRow, source: Source, label: Callable[[str], str]) -> str:
    figures = "".join(_figure(picture, label(name), row.prompt, source) for name, picture in row.pictures.items())
    return f'<div class="card"><p class="prompt">{escape(row.prompt)}</p>{pictures(figures, len(row.pictures))}</div>'


def pictures(figures: str, count: int) -> str:
    """Figures side by side, in as many rows as they need; `count` of them."""
    return f'<div class="pictures" style="--n:{count}">{figures}</div>'


def _figure(picture: Picture, label: str, prompt: str, source: Source) -> str:
    url, small = source(picture.file)
    kind = "small" if small else "large"
    return (
        f'<figure><button class="enlarge" type="button" data-text="{escape(f"{label}: {prompt}")}">'
        f'<img class="{kind}" alt="{escape(label)}" src="{escape(url)}" loading="lazy"></button>'
        f"{caption(label, picture.scores)}</figure>"
    )


def embedded(image: Path) -> tuple[str, bool]:
    """The image as a URL that has its content, and whether its pixels are few.

    Raises:
        RtdmdError: the image cannot be read.
    """
    try:
        data = image.read_bytes()
    except OSError as error:
        raise RtdmdError(f"{image}: named in gallery.json, but cannot be read: {error.strerror}") from error
    return f"data:image/png;base64,{base64.b64encode(data).decode()}", len(data) < SMALL_IMAGE_BYTES


def caption(label: str, scores: Mapping[str, float]) -> str:
    """The label of a picture and its scores."""
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{shown(value)}</dd>" for name, value in scores.items())
    return f"<figcaption><b>{escape(label)}</b><dl>{terms}</dl></figcaption>"


@dataclass(frozen=True)
class Sprite:
    """An image of equal tiles, in rows and columns.

    Attributes:
        ratio: width of a tile, divided by its height.
        small: whether its pixels are shown with hard edges.
    """

    url: str
    columns: int
    rows: int
    ratio: float
    small: bool

    def tile(self, column: int, row: int, label: str, *, enlarge: bool = True) -> str:
        """One tile as HTML; with `enlarge` a button that shows it large."""
        across = 100 * column / max(self.columns - 1, 1)
        down = 100 * row / max(self.rows - 1, 1)
        style = (
            f"background-image:url({self.url});background-size:{100 * self.columns}% {100 * self.rows}%;"
            f"background-position:{across:.4f}% {down:.4f}%;aspect-ratio:{self.ratio:.4f}"
        )
        kind = "tile small" if self.small else "tile"
        tile = f'<div class="{kind}" role="img" aria-label="{escape(label)}" style="{escape(style)}"></div>'
        if not enlarge:
            return tile
        return (
            f'<button class="enlarge" type="button" data-ratio="{self.ratio:.4f}" data-text="{escape(label)}">'
            f"{tile}</button>"
        )


def shown(value: str | float) -> str:
    """A number with four digits, or a text, as HTML."""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
