"""Runs that hack their rewards, and clean ones: when the watchdog raises an alarm, and what gold has lost by then.

    python -m benchmarks.watchdog [--arms no_matching clean] [--seeds 0] [--tables]

Every run trains in this process, with the samplers and trainers of the service and the options in `arms.py`. What the
watchdog saw of it is kept as one JSON file in `benchmarks/watchdog/results`; what is there already is read. The tables
come from replaying these files through today's watchdog. `--tables` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.watchdog.arms import ARMS, COMMON
from benchmarks.watchdog.tables import tables
from benchmarks.watchdog.training import Training
from common.command import user_path
from common.whole_files import write_whole

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    arguments = _parse()
    if not arguments.tables:
        for seed in arguments.seeds:
            for name in arguments.arms:
                _run(name, seed, arguments)
    print(tables(arguments.results))
    return 0


def _run(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train an arm, unless its result is there."""
    kept = arguments.results / f"{name}-{seed}.json"
    if kept.exists():
        return
    started, options = time.process_time(), {**COMMON, **ARMS[name], "run.seed": seed}
    training = Training(options)
    training.cold_start(arguments.starts / f"start-{seed}.safetensors")
    with TemporaryDirectory() as folder:
        found = training.align(Path(folder) / "run")
    seconds = time.process_time() - started
    about = {"arm": name, "seed": seed, "cpu_seconds": seconds, "options": {k: str(v) for k, v in options.items()}}
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_whole(kept, (json.dumps(about | found) + "\n").encode())
    print(f"{name}, seed {seed}: {seconds:.0f} s of processor", file=sys.stderr)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchdog", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS), help="only these runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", type=user_path, default=Path("runs/watchdog"), help="where the starts are kept")
    parser.add_argument("--results", type=user_path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables of the kept results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
