"""Report of a run, report.html: final table, before/after gallery, curves, timeline, seconds, configuration.

    rtdmd report RUN_DIR

It is one file without references to others. `learner/records/run_files.py` says which files of the run it reads. All
but metrics.jsonl may be missing: the report of an interrupted run shows what exists.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from common.command import exit_status, user_path
from common.whole_files import write_whole
from learner.records.page import whole_page
from learner.records.run_files import GalleryRow, Record, RunFiles, policy_label, read_metrics, read_run
from learner.records.sections import curves_of, curves_section, embedded, gallery_rows, policies_table, shown
from learner.records.timeline import log_events, timeline


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's directory and return its path.

    Raises:
        RtdmdError: there is no metrics.jsonl, or a file in the directory is damaged.
    """
    records, run = read_metrics(run_dir), read_run(run_dir)
    sections = [
        _header(run),
        _result_section(run),
        _gallery_section(run.gallery),
        curves_section({"": curves_of(records)}, run.policies),
        timeline(records, log_events(run_dir / "logs" / "run.log")),
        _seconds_section(run.seconds, records),
        _config_section(run.config),
    ]
    report = run_dir / "report.html"
    write_whole(report, whole_page(run.name, sections).encode())
    return report


def _header(run: RunFiles) -> str:
    facts = " · ".join(f"{escape(name)} {shown(value)}" for name, value in run.facts.items())
    return f'<h1>{escape(run.name)}</h1><p class="note">{facts}</p>'


def _result_section(run: RunFiles) -> str:
    unfinished = "" if run.finished else '<p class="note">No summary yet: the run has not finished.</p>'
    if not run.policies:
        return unfinished
    labels = {name: escape(policy_label(name)) for name in run.policies}
    return f"<h2>Result</h2>{unfinished}{policies_table(run.policies, labels)}"


def _gallery_section(gallery: Sequence[GalleryRow]) -> str:
    if not gallery:
        return ""
    return (
        '<h2>Before and after</h2><p class="note">One prompt and one initial noise, by policy, with what each '
        f"reward says of the picture. Click on a picture to enlarge it.</p>{gallery_rows(gallery, embedded)}"
    )


def _seconds_section(seconds: Mapping[str, float], records: Sequence[Record]) -> str:
    parts: dict[str, float] = defaultdict(float)
    for record in records:
        for name, value in record.seconds.items():
            parts[f"{policy_label(record.stage)}: {name}"] += value
    tables = "".join(
        _seconds_table(title, rows) for title, rows in (("Whole run", seconds), ("Within iterations", parts))
    )
    return f'<h2>Seconds</h2><div class="tables">{tables}</div>' if tables else ""


def _seconds_table(title: str, seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:,.1f}</td></tr>" for name, value in seconds.items())
    return f'<div class="card"><h3>{title}</h3><table><tbody>{rows}</tbody></table></div>'


def _config_section(text: str) -> str:
    if not text:
        return ""
    return (
        f'<h2>Configuration</h2><details class="card"><summary>config.yaml</summary><pre>{escape(text)}</pre></details>'
    )


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd report RUN_DIR`; the exit status is 1 when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="rtdmd report", description="Rewrite a run's report.html.")
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="run directory, such as runs/NAME")
    return exit_status(lambda: print(write_report(parser.parse_args(argv).run_dir)))
