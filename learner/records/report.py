"""Report of a run, report.html: final table, before/after gallery, curves, seconds, configuration. One file, no script.

    rtdmd report RUN_DIR

Reads these files of the run's directory:

    metrics.jsonl         JSON lines: {"stage", "iteration", "kind": "train" | "evaluation", "metrics", "seconds"}
    summary.json          {"policies": {name: {metric: value}}, "seconds": {part: value}, "run": {...}}
    samples/gallery.json  [{"prompt", "policies": {name: {"image": file beside it, "scores": {name: value}}}}]
    config.yaml           the resolved configuration

All but metrics.jsonl may be missing: the report of an interrupted run shows what exists.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from common.command import exit_status, user_path
from common.errors import RtdmdError
from common.whole_files import write_whole
from learner.metric_names import GROUP_ERROR
from learner.records.charts import Point, line_chart
from learner.records.style import STYLE

SMALL_IMAGE_BYTES = 40_000  # about a 128 px PNG: such images are enlarged with hard edges

Record = Mapping[str, Any]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's directory and return its path.

    Raises:
        RtdmdError: there is no metrics.jsonl, or a file in the directory is damaged.
    """
    records = _read_metrics(run_dir / "metrics.jsonl")
    with _damage_told(run_dir / "summary.json") as path:
        summary = _read_json(path, {})
        policies = summary.get("policies", {})
        header, result = _header(run_dir, summary.get("run", {})), _policies_section(policies)
        curves = _curves_section(records, policies)
        seconds = _seconds_section(summary.get("seconds", {}), records)
    with _damage_told(run_dir / "samples" / "gallery.json") as path:
        gallery = _gallery_section(_read_json(path, []), path.parent)
    config = run_dir / "config.yaml"
    settings = _config_section(config.read_text(encoding="utf-8", errors="replace") if config.exists() else "")
    report = run_dir / "report.html"
    write_whole(report, _page(run_dir.name, [header, result, gallery, curves, seconds, settings]).encode())
    return report


@contextmanager
def _damage_told(path: Path) -> Iterator[Path]:
    """RtdmdError if a file's content is not what a run writes."""
    try:
        yield path
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RtdmdError(
            f"{path}: not what a run writes ({error!r}): restore it, or remove it to report without"
        ) from error


def _read_metrics(path: Path) -> list[Record]:
    """Records in order. If a resumed run wrote an iteration twice, the later counts; a torn last line is ignored."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise RtdmdError(f"{path}: missing: {path.parent} is not the directory of a run") from error
    records: dict[tuple[str, int, str], Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            values = [record["iteration"], *record["metrics"].values(), *record.get("seconds", {}).values()]
            if not all(isinstance(value, int | float) for value in values):
                raise TypeError("a value is not a number")
            records[record["stage"], record["iteration"], record["kind"]] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise RtdmdError(f"{path}: line {number} is not a metrics record: {error!r}") from error
    return sorted(records.values(), key=lambda record: record["iteration"])


def _read_json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return otherwise


def _page(title: str, sections: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(run_dir: Path, run: Mapping[str, Any]) -> str:
    facts = " · ".join(f"{escape(str(name))} {escape(_shown(value))}" for name, value in run.items())
    return f'<h1>{escape(run_dir.resolve().name)}</h1><p class="note">{facts}</p>'


def _policies_section(policies: Mapping[str, Mapping[str, float]]) -> str:
    if not policies:
        return '<p class="note">No summary yet: the run has not finished.</p>'
    metrics = list(dict.fromkeys(name for values in policies.values() for name in values))
    best = {metric: _best(metric, policies) for metric in metrics}
    head = "".join(f"<th>{escape(metric)}</th>" for metric in metrics)
    rows = "".join(_policy_row(name, values, metrics, best) for name, values in policies.items())
    return (
        '<h2>Result</h2><p class="note">Same held-out prompts and seeds for every policy; the highest value of each '
        f'column is marked.</p><div class="card"><table><thead><tr><th>policy</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _policy_row(name: str, values: Mapping[str, float], metrics: Sequence[str], best: Mapping[str, str]) -> str:
    cells = [f"<td>{escape(policy_label(name))}</td>"]
    for metric in metrics:
        mark = ' class="best"' if name == best[metric] else ""
        cells.append(f"<td{mark}>{escape(_shown(values.get(metric, '–')))}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def policy_label(name: str) -> str:
    """`teacher_28` -> "Teacher, 28 steps"; other names lose their underscores."""
    teacher = re.fullmatch(r"teacher_(\d+)", name)
    if teacher:
        return f"Teacher, {teacher[1]} steps"
    return {"rtdmd": "RTDMD", "cold_start": "Cold start"}.get(name, name.replace("_", " "))


def _gallery_section(gallery: Sequence[Mapping[str, Any]], directory: Path) -> str:
    if not gallery:
        return ""
    entries = "".join(_gallery_entry(entry, directory) for entry in gallery)
    return (
        '<h2>Before and after</h2><p class="note">One prompt and one initial noise, by policy, with what each '
        f'reward says of the picture.</p><div class="gallery">{entries}</div>'
    )


def _gallery_entry(entry: Mapping[str, Any], directory: Path) -> str:
    figures = "".join(
        _figure(policy_label(name), picture["scores"], directory / picture["image"])
        for name, picture in entry["policies"].items()
    )
    return (
        f'<div class="card"><p class="prompt">{escape(entry["prompt"])}</p><div class="pictures">{figures}</div></div>'
    )


def _figure(label: str, scores: Mapping[str, float], image: Path) -> str:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise RtdmdError(f"{image}: named in gallery.json, but cannot be read: {error.strerror}") from error
    kind = "small" if len(data) < SMALL_IMAGE_BYTES else "large"
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd>" for name, value in scores.items())
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><img class="{kind}" alt="{escape(label)}" src="{source}">'
        f"<figcaption>{escape(label)}<dl>{terms}</dl></figcaption></figure>"
    )


def _curves_section(records: Sequence[Record], policies: Mapping[str, Mapping[str, float]]) -> str:
    curves: dict[tuple[str, str], dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, value in record["metrics"].items():
            if not name.startswith(GROUP_ERROR):
                curves[record["stage"], record["kind"]][name].append((record["iteration"], value))
    parts = []
    for stage in ("alignment", "cold_start"):
        for kind in ("evaluation", "train"):
            references = policies if kind == "evaluation" else {}
            parts.append(_charts(policy_label(stage), kind, curves.get((stage, kind), {}), references))
    note = '<p class="note">Thin: every iteration. Thick: moving average. Dashed: the teacher in the final table.</p>'
    return f"<h2>Curves</h2>{note}{''.join(parts)}" if any(parts) else ""


def _charts(
    stage: str, kind: str, curves: Mapping[str, list[Point]], references: Mapping[str, Mapping[str, float]]
) -> str:
    if not curves:
        return ""
    charts = []
    for name, points in curves.items():
        levels = {
            policy_label(policy): references[policy][name]
            for policy in references
            if policy.startswith("teacher_") and name in references[policy]
        }
        charts.append(line_chart(name, points, levels))
    heading = f"{stage.capitalize()}: {'evaluation' if kind == 'evaluation' else 'training'}, by iteration"
    return f'<h3>{escape(heading)}</h3><div class="charts">{"".join(charts)}</div>'


def _seconds_section(seconds: Mapping[str, float], records: Sequence[Record]) -> str:
    parts: dict[str, float] = defaultdict(float)
    for record in records:
        for name, value in record.get("seconds", {}).items():
            parts[f"{policy_label(record['stage'])}: {name}"] += value
    tables = "".join(
        _seconds_table(title, rows) for title, rows in (("Whole run", seconds), ("Within iterations", parts))
    )
    return f"<h2>Seconds</h2>{tables}" if tables else ""


def _seconds_table(title: str, seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:,.1f}</td></tr>" for name, value in seconds.items())
    return f'<h3>{title}</h3><div class="card"><table><tbody>{rows}</tbody></table></div>'


def _config_section(text: str) -> str:
    if not text:
        return ""
    return (
        f'<h2>Configuration</h2><details class="card"><summary>config.yaml</summary><pre>{escape(text)}</pre></details>'
    )


def _best(metric: str, policies: Mapping[str, Mapping[str, float]]) -> str:
    """The policy with the highest finite value; "" when there is no single one."""
    values = {name: row[metric] for name, row in policies.items() if metric in row and math.isfinite(row[metric])}
    highest = [name for name, value in values.items() if value == max(values.values())]
    return highest[0] if len(highest) == 1 else ""


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd report RUN_DIR`; the exit status is 1 when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="rtdmd report", description="Rewrite a run's report.html.")
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="run directory, such as runs/NAME")
    return exit_status(lambda: print(write_report(parser.parse_args(argv).run_dir)))
