"""Tests a claim of the method: trains its arms with several seeds, and compares them by paired differences.

    python -m benchmarks.claims A [--arms plain ac_dmd] [--seeds 0 1 2] [--at-once 2] [--tables]

Every run is a whole run of the service with the options in `arms.py`. It is kept as one JSON file in
`benchmarks/claims/results`; what is there already is read. `--tables` reads only. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.claims.arms import CLAIMS, FINAL_FROM
from benchmarks.claims.prompts import own_rows_of
from benchmarks.claims.running import Places, run_arm
from benchmarks.claims.tables import tables
from common.command import user_path

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    arguments = _parse()
    claim = CLAIMS[arguments.claim]
    names = arguments.arms or list(claim.arms)
    unknown = [name for name in names if name not in claim.arms]
    if unknown:
        print(f"--arms: claim {arguments.claim} has no {unknown[0]!r}, but {', '.join(claim.arms)}", file=sys.stderr)
        return 2
    places = Places(arguments.runs, arguments.results)
    if not arguments.tables:
        _prepare(arguments, places)
        _run_all([(name, seed) for seed in arguments.seeds for name in names], arguments, places)
    results = {
        name: {
            seed: json.loads(places.result(arguments.claim, name, seed).read_text())
            for seed in arguments.seeds
            if places.result(arguments.claim, name, seed).exists()
        }
        for name in names
    }
    results = {name: seeds for name, seeds in results.items() if seeds}
    rows = own_rows_of(*claim.prompts, FINAL_FROM)
    title = f"{arguments.claim}. {claim.statement}; final tables over the {len(rows)} prompts of their own"
    print(f"{title}\n\n{tables(claim, results, rows)}" if results else "no results yet")
    return 0


def _prepare(arguments: argparse.Namespace, places: Places) -> None:
    """Make the starts first: two arms that need the same one must not both make it."""
    _run_all(
        [(name, seed) for seed in arguments.seeds for name in CLAIMS[arguments.claim].preparing], arguments, places
    )


def _run_all(arms: list[tuple[str, int]], arguments: argparse.Namespace, places: Places) -> None:
    with ThreadPoolExecutor(arguments.at_once) as pool:
        running = {one: pool.submit(run_arm, arguments.claim, *one, places) for one in arms}
        try:
            for (name, seed), run in running.items():
                seconds = run.result()["cpu_seconds"]
                cost = "its cost is not known" if seconds is None else f"{seconds:.0f} s of processor"
                print(f"{name}, seed {seed}: {cost}", file=sys.stderr)
        finally:
            pool.shutdown(cancel_futures=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.splitlines()[0])
    parser.add_argument("claim", choices=sorted(CLAIMS))
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, with one thread each (default 1)")
    parser.add_argument("--runs", type=user_path, default=Path("runs/claims"), help="where the runs write")
    parser.add_argument("--results", type=user_path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables of the kept results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
