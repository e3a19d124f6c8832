"""Comparison of runs, one HTML file: final tables, curves and galleries side by side.

    rtdmd compare RUN_DIR RUN_DIR ... [--out compare.html]

Runs that were evaluated on the same prompts with the same noise are compared prompt by prompt; others as independent
samples. The page needs no other file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from common.command import exit_status, user_path
from common.errors import ConfigError
from common.whole_files import write_whole
from learner.records.page import whole_page
from learner.records.run_files import GalleryRow, Picture, PolicyResult, RunFiles, policy_label, read_metrics, read_run
from learner.records.sections import curves_of, curves_section, embedded, gallery_rows, policies_table, swatch, swatches

SHOWN_POLICIES = ("rtdmd", "cold_start")
"""The gallery shows the first of these that a run has, beside the teachers of the first run."""


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path.

    Raises:
        ConfigError: fewer than two runs are given, or one of them twice.
        RtdmdError: a directory is not that of a run, or one of its files is damaged.
    """
    if len({run_dir.resolve() for run_dir in run_dirs}) < max(2, len(run_dirs)):
        raise ConfigError(f"{', '.join(map(str, run_dirs))}: name at least two different run directories")
    labels = _labels(run_dirs)
    runs = {label: read_run(run_dir) for label, run_dir in zip(labels, run_dirs, strict=True)}
    curves = {label: curves_of(read_metrics(run_dir)) for label, run_dir in zip(labels, run_dirs, strict=True)}
    sections = [
        f'<h1>{escape(" · ".join(labels))}</h1><p class="note">{swatches(labels)}</p>',
        _result_section(runs),
        _gallery_section(runs),
        curves_section(curves, {}),
        _settings_section(runs),
    ]
    write_whole(out, whole_page("Comparison", sections).encode())
    return out


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """The directories' names; whole paths where two have the same name."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    times = Counter(names)
    return [name if times[name] == 1 else str(path) for name, path in zip(names, run_dirs, strict=True)]


def _result_section(runs: Mapping[str, RunFiles]) -> str:
    """The policies of all runs in one table."""
    policies: dict[str, PolicyResult] = {}
    labels = {}
    for place, (label, run) in enumerate(runs.items()):
        for name, result in run.policies.items():
            if name.startswith("teacher_") and result in policies.values():
                continue  # the same teacher on the same prompts and noise
            key = f"{place}/{name}"
            policies[key] = result
            labels[key] = f"{swatch(place)}{escape(label)}: {escape(policy_label(name))}"
    if not policies:
        return '<p class="note">None of the runs has evaluated a policy yet.</p>'
    return f"<h2>Results</h2>{_fairness(policies)}{policies_table(policies, labels)}"


def _fairness(policies: Mapping[str, PolicyResult]) -> str:
    """A warning if the runs were not evaluated on the same prompts."""
    if len({result.basis for result in policies.values()}) == 1:
        return ""
    return (
        '<p class="note warning">The runs were evaluated on different prompts, numbers of images or seeds: compare '
        "their values with care.</p>"
    )


def _gallery_section(runs: Mapping[str, RunFiles]) -> str:
    """Each prompt once: the first run's teacher, then the student of every run that has the prompt."""
    rows: dict[str, dict[str, Picture]] = {}
    for label, run in runs.items():
        for row in run.gallery:
            pictures = rows.setdefault(row.prompt, {})
            if not pictures:
                teachers = ((name, picture) for name, picture in row.pictures.items() if name.startswith("teacher_"))
                pictures.update((policy_label(name), picture) for name, picture in teachers)
            student = next((name for name in SHOWN_POLICIES if name in row.pictures), None)
            if student is not None:
                pictures[f"{label}: {policy_label(student)}"] = row.pictures[student]
    if not rows:
        return ""
    gallery = [GalleryRow(prompt, pictures) for prompt, pictures in rows.items()]
    return f"<h2>Pictures</h2>{gallery_rows(gallery, embedded, str)}"


def _settings_section(runs: Mapping[str, RunFiles]) -> str:
    """The lines of the configurations that are not in all of them."""
    lines = {label: run.config.splitlines() for label, run in runs.items()}
    common = set.intersection(*(set(found) for found in lines.values()))
    parts = [
        f'<div class="card"><h3>{swatch(place)}{escape(label)}</h3><pre>'
        f"{escape(_own_lines(found, common)) or 'nothing of its own'}</pre></div>"
        for place, (label, found) in enumerate(lines.items())
        if found
    ]
    note = '<p class="note">Lines of config.yaml that not all runs have.</p>'
    return f'<h2>Settings that differ</h2>{note}<div class="tables">{"".join(parts)}</div>' if parts else ""


def _own_lines(lines: Sequence[str], common: set[str]) -> str:
    """The lines that are not common to all, each below the section that it is in."""
    section, own = "", []
    for line in lines:
        if line and not line[0].isspace() and not line.startswith("-"):
            section = line
        if line not in common:
            if section and section != line:
                own.append(section)
                section = ""
            own.append(line)
    return "\n".join(own)


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd compare`; exit status as in `common.command.exit_status`."""
    parser = argparse.ArgumentParser(prog="rtdmd compare", description="Write one HTML page that compares runs.")
    parser.add_argument("run_dirs", type=user_path, nargs="+", metavar="RUN_DIR", help="two or more run directories")
    parser.add_argument(
        "--out", type=user_path, default=Path("compare.html"), metavar="FILE", help="default compare.html"
    )
    arguments = parser.parse_args(argv)
    return exit_status(lambda: print(write_comparison(arguments.run_dirs, arguments.out)), place=arguments.out)
