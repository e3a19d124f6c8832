"""Throughput, staleness, recovery and broadcast of a run on a large cluster, in virtual time.

    python -m benchmarks.simulate [--parts sizes stragglers faults broadcast local] [--workers 256] [--seed 0]

The driver's loop, pool, rollouts, publisher and ledger are the real ones. Workers, learner and network are simulated
(`scenario.py` has their seconds and bytes). `local` compares the prediction with real workers on this machine. Every
part prints a table.
"""

from __future__ import annotations

import argparse

from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.tables import TABLES


def main() -> None:
    arguments = _parse()
    base = Scenario(workers=arguments.workers, seed=arguments.seed)
    for name in arguments.parts:
        print(f"\n{name}\n")
        for line in TABLES[name](base):
            print(line, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=[*TABLES], default=[*TABLES], help="tables to compute")
    parser.add_argument("--workers", type=int, default=256, help="workers, 8 per machine")
    parser.add_argument("--seed", type=int, default=0, help="of jitter and faults")
    return parser.parse_args()


if __name__ == "__main__":
    main()
