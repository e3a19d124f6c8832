"""The whole demo for several seeds: every policy's metrics, and whether the run reached what it must.

    python benchmarks/seeds.py [--seeds 0 1 2] [--runs runs/seeds] [--out FILE]

Finished runs are read, not repeated. Prints one JSON object and, with --out, writes a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parents[1]
Policies = dict[str, dict[str, float]]


def main() -> None:
    arguments = _parse()
    summaries = {seed: _run(seed, arguments) for seed in arguments.seeds}
    report = {
        "benchmark": "seeds",
        "cpus": os.cpu_count(),
        "seconds": {seed: summary["seconds"]["total"] for seed, summary in summaries.items()},
        "policies": {seed: summary["policies"] for seed, summary in summaries.items()},
        "reached": {seed: _reached(summary["policies"]) for seed, summary in summaries.items()},
    }
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(_table([summary["policies"] for summary in summaries.values()]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "deploy/runs/shapes.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="where the runs write")
    parser.add_argument("--out", type=Path, help="markdown file for the table")
    return parser.parse_args()


def _run(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    run_dir = arguments.runs / f"seed-{seed}"
    if not (run_dir / "summary.json").exists():
        command = [sys.executable, str(PROJECT_ROOT / "learner/main.py"), "--config", str(arguments.config)]
        command += ["--run.seed", str(seed), "--run-dir", str(run_dir)]
        if run_dir.exists():
            command.append("--resume")
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "output.log").open("ab") as log:
            subprocess.run(command, check=True, cwd=PROJECT_ROOT, stdout=log, stderr=log)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def _reached(policies: Policies) -> dict[str, float | bool]:
    """The demo's criteria: what the cold start closes of the gold gap, what alignment adds."""
    teacher, few, cold, aligned = policies.values()
    trained = [name for name in teacher if name not in ("gold", "diversity")]
    return {
        "teacher_gold_gap": teacher["gold"] - few["gold"],
        "cold_start_closes": (cold["gold"] - few["gold"]) / (teacher["gold"] - few["gold"]),
        "every_reward_above_teacher": all(aligned[name] > teacher[name] for name in trained),
        "gold_above_teacher": aligned["gold"] >= teacher["gold"],
        "diversity_kept": aligned["diversity"] / cold["diversity"],
    }


def _table(runs: list[Policies]) -> str:
    """Mean and standard deviation over the seeds."""
    columns = list(next(iter(runs[0].values())))
    lines = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for policy in runs[0]:
        cells = []
        for column in columns:
            values = [run[policy][column] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
