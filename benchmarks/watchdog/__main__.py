"""Runs that hack their rewards, and clean ones: when the watchdog raises an alarm, and what gold has lost by then.

    python -m benchmarks.watchdog [--arms nft subgrpo] [--seeds 0] [--tables]

Every run is a whole run of the service with the options in `arms.py`. What the watchdog saw of it is kept as one JSON
file in `benchmarks/watchdog/results`; what is there already is read. The tables come from replaying these files through
today's watchdog. `--tables` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.claims.running import Places, cold_start_of, run_service
from benchmarks.watchdog.arms import WATCHED
from benchmarks.watchdog.tables import tables
from common.command import user_path
from common.whole_files import write_whole
from learner.driver.watchdog import WATCHDOG_FILE
from learner.metric_names import GROUP_ERROR, GROUP_MEAN, GROUPS

RESULTS = Path(__file__).parent / "results"
CLAIMS_RESULTS = Path(__file__).parents[1] / "claims/results"
SEEN = (GROUPS, f"{GROUP_MEAN}/", f"{GROUP_ERROR}/")
"""Beginnings of the metrics that the watchdog reads."""


def main() -> int:
    arguments = _parse()
    if not arguments.tables:
        for seed in arguments.seeds:
            for name in arguments.arms:
                _run(name, seed, arguments)
    print(tables(arguments.results))
    return 0


def _run(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Run an arm, unless its result is there."""
    kept = arguments.results / f"{name}-{seed}.json"
    if kept.exists():
        return
    watched, run_dir = WATCHED[name], arguments.runs / "watchdog" / f"{name}-{seed}"
    options = {**watched.all_options, "run.seed": seed, "run.name": f"watchdog-{name}-{seed}"}
    started = {"cold_start.from_checkpoint": _start(name, seed, arguments)}
    seconds = run_service(watched.config, {**options, **started}, run_dir)
    about = {"arm": name, "seed": seed, "cpu_seconds": seconds, "options": {k: str(v) for k, v in options.items()}}
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_whole(kept, (json.dumps(about | _seen(run_dir)) + "\n").encode())
    cost = "its cost is not known" if seconds is None else f"{seconds:.0f} s of processor"
    print(f"{name}, seed {seed}: {cost}", file=sys.stderr)


def _start(name: str, seed: int, arguments: argparse.Namespace) -> str:
    watched = WATCHED[name]
    return cold_start_of(watched.claim, watched.start, seed, Places(arguments.runs, CLAIMS_RESULTS))


def _seen(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a finished run that the watchdog has read."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    trained = [line for line in lines if (line["stage"], line["kind"]) == ("alignment", "train")]
    for line in trained:
        line["metrics"] = {name: value for name, value in line["metrics"].items() if name.startswith(SEEN)}
    looked = map(json.loads, (run_dir / WATCHDOG_FILE).read_text().splitlines())
    return {"iterations": trained, "evaluations": [line for line in looked if line["kind"] == "evaluation"]}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchdog", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=sorted(WATCHED), default=list(WATCHED), help="only these runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=user_path, default=Path("runs/claims"), help="where the runs write")
    parser.add_argument("--results", type=user_path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables of the kept results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
