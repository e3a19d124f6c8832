"""Line charts as SVG text: axes, ticks, lines, reference levels, a legend. Colours come from the page's CSS."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 42
TICKS = 5
SMOOTHING_FRACTION = 0.08  # window of the moving average, as a fraction of the curve
MOST_POINTS = 240
"""A chart has about as many pixels across; a run may have 15 000 iterations."""
SERIES_COLOURS = 8
SMOOTHING_MIN_POINTS = 12  # a shorter curve is drawn without smoothing, with its points


@dataclass(frozen=True)
class Frame:
    """The range of the data and its place on the chart."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def around(cls, points: Sequence[Point], levels: Sequence[float]) -> Frame:
        """The smallest frame with round ticks that shows all points; a flat curve still gets a height."""
        xs = [x for x, _ in points]
        ys = [*(y for _, y in points), *levels]
        y_low, y_high = min(ys), max(ys)
        margin = 0.08 * (y_high - y_low) or 0.1 * abs(y_high) or 1.0
        x_low, x_high = min(xs), max(xs)
        if x_low == x_high:
            x_low, x_high = x_low - 1, x_high + 1
        return cls(x_low, x_high, y_low - margin, y_high + margin)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, series: Mapping[str, Sequence[Point]], levels: Mapping[str, float] | None = None) -> str:
    """One metric over iterations, one line per series (label -> points), with dashed reference levels (label -> value).

    Points that are not finite are left out; a chart without a finite point says so. A long series is drawn by the means
    of equal stretches. `learner/records/script.py` shows the values under the pointer, from the attribute data-chart.
    """
    levels = {label: value for label, value in (levels or {}).items() if math.isfinite(value)}
    drawn = {
        label: thinned([(x, y) for x, y in points if math.isfinite(y)], MOST_POINTS) for label, points in series.items()
    }
    every = [point for points in drawn.values() for point in points]
    if not every:
        return _svg(title, [_text(WIDTH / 2, HEIGHT / 2, "nothing measured", "middle")])
    frame = Frame.around(every, list(levels.values()))
    curves = [part for place, points in enumerate(drawn.values()) if points for part in _curve(frame, points, place)]
    return _svg(title, [*_axes(frame), *_levels(frame, levels), *curves], _hover_data(frame, drawn))


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: the means of equal stretches. A point that stands alone stays as it is."""
    stretch = -(-len(points) // most)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch or 1)]
    return [(_mean([x for x, _ in part]), _mean([y for _, y in part])) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)


def _hover_data(frame: Frame, series: Mapping[str, Sequence[Point]]) -> str:
    lines = [
        {"label": label, "points": [[round(x, 1), float(f"{y:.5g}")] for x, y in points]}
        for label, points in series.items()
        if points
    ]
    data = {
        "box": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "frame": [frame.x_low, frame.x_high, frame.y_low, frame.y_high],
        "series": lines,
    }
    return json.dumps(data, separators=(",", ":"))


def round_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` points; fewer at the ends."""
    half = window // 2
    averaged = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - half) : index + half + 1]
        averaged.append((x, sum(y for _, y in near) / len(near)))
    return averaged


def _curve(frame: Frame, points: Sequence[Point], place: int) -> list[str]:
    colour = f"series-{place % SERIES_COLOURS}"
    if len(points) < SMOOTHING_MIN_POINTS:
        dots = [
            f'<circle class="dot {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>' for x, y in points
        ]
        return [_polyline(frame, points, f"line {colour}"), *dots]
    window = max(3, round(SMOOTHING_FRACTION * len(points)))
    smooth = moving_average(points, window)
    return [_polyline(frame, points, f"raw {colour}"), _polyline(frame, smooth, f"line {colour}")]


def _polyline(frame: Frame, points: Sequence[Point], style: str) -> str:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="{style}" points="{path}"/>'


def _axes(frame: Frame) -> list[str]:
    parts = []
    bottom = HEIGHT - BOTTOM
    for value in round_ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 3.5, f"{value:.4g}", "end"))
    for value in round_ticks(frame.x_low, frame.x_high):
        x = frame.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 15, f"{value:.6g}", "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _levels(frame: Frame, levels: Mapping[str, float]) -> list[str]:
    """Dashed lines, named in a legend below the axis."""
    parts = []
    x = float(LEFT)
    for index, (label, value) in enumerate(levels.items()):
        y = frame.y(value)
        style = f"level level-{index % 3}"
        parts.append(f'<line class="{style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="{style}" x1="{x:.1f}" x2="{x + 16:.1f}" y1="{HEIGHT - 10}" y2="{HEIGHT - 10}"/>')
        parts.append(_text(x + 20, HEIGHT - 6.5, label, "start"))
        x += 32 + 5.6 * len(label)
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str], hover: str = "") -> str:
    heading = f'<text class="title" x="{LEFT - 44}" y="17">{escape(title)}</text>'
    data = f' data-chart="{escape(hover)}"' if hover else ""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{data}>'
        f"{heading}{''.join(parts)}</svg>"
    )
