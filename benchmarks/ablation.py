"""Ablation of RTDMD's parts: same cold start, same budget, one seed, every combination.

    python benchmarks/ablation.py --cold-start runs/shapes/checkpoints/cold_start-001450 [--iterations 40] [--out FILE]

{subgrpo, grpo, none} x {back-propagation on, off} x {matching on, off}; the run without any of them is left out, since
nothing would train. Prints one JSON object and, with --out, writes a markdown table. Nothing is timed, so `--at-once 2`
may use the cores better, with one thread for each learner. Options not known here (`--alignment.matching_weight 1`) go
to every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
Policies = dict[str, dict[str, float]]
POLICY_GRADIENTS = ("subgrpo", "grpo", "none")


def main() -> None:
    arguments = _parse()
    combinations = {
        f"{policy}{'+backprop' if backprop else ''}{'+matching' if matching else ''}": (policy, backprop, matching)
        for policy, backprop, matching in itertools.product(POLICY_GRADIENTS, (True, False), (True, False))
        if policy != "none" or backprop or matching
    }
    results: Policies = {}
    with ThreadPoolExecutor(arguments.at_once) as pool:
        runs = {name: pool.submit(_run, name, *parts, arguments) for name, parts in combinations.items()}
        try:
            for name, run in runs.items():
                policies = run.result()
                # All of them start from the same student.
                results.setdefault("cold start alone", policies["cold_start"])
                results[name] = policies["rtdmd"]
                print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(json.dumps({"benchmark": "ablation", "iterations": arguments.iterations, "results": results}, indent=1))
    if arguments.out:
        arguments.out.write_text(_table(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cold-start", type=Path, required=True, help="checkpoint directory all of them start from")
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "deploy/runs/shapes.yaml")
    parser.add_argument("--iterations", type=int, default=40, help="alignment iterations of each run")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="where the runs write")
    parser.add_argument("--out", type=Path, help="markdown file for the table")
    arguments, arguments.overrides = parser.parse_known_args()
    return arguments


def _run(name: str, policy: str, backprop: bool, matching: bool, arguments: argparse.Namespace) -> Policies:
    """One run; finished ones are read, not repeated."""
    run_dir = arguments.runs / name
    summary = run_dir / "summary.json"
    if not summary.exists():
        options = [f"--alignment.iterations={arguments.iterations}", f"--alignment.policy_gradient={policy}"]
        options.append("--evaluation.teacher=false")
        if arguments.at_once > 1:
            options.append("--learner.threads=1")
        if not backprop:
            options.append("--alignment.reward_gradient_weight=0")
        if not matching:
            options.append("--alignment.matching_weight=0")
        command = [sys.executable, str(PROJECT_ROOT / "learner/main.py"), "--config", str(arguments.config)]
        command += [
            "--run-dir",
            str(run_dir),
            f"--cold_start.from_checkpoint={arguments.cold_start}",
            *arguments.overrides,
            *options,
        ]
        if run_dir.exists():
            command.append("--resume")
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "output.log").open("ab") as log:
            subprocess.run(command, check=True, cwd=PROJECT_ROOT, env=dict(os.environ), stdout=log, stderr=log)
    policies: Policies = json.loads(summary.read_text())["policies"]
    return policies


def _table(results: Policies) -> str:
    columns = list(next(iter(results.values())))
    lines = ["| trained with | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, metrics in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{metrics[column]:.3f}" for column in columns) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
