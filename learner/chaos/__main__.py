"""Breaks a run at random moments, and compares its end with that of the same run left alone.

    python -m learner.chaos --run-dir DIR [--seed 0] [--injections 8] [--minutes 30] [-- OPTIONS OF rtdmd train]

Without options the smoke run of the shapes world is taken, with 24 iterations of stage 2. DIR gets the two runs,
`undisturbed` (kept for further seeds) and `seed-N`, and `seed-N.json` with the faults. Exit status 1: the run hung,
failed, or ended otherwise. Only runs with `alignment.max_staleness: 0` end bit for bit alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.command import exit_status, some_time, user_path
from common.errors import ConfigError, LearnerError
from common.whole_files import write_whole
from learner.chaos.comparison import differences
from learner.chaos.disturbed_run import DisturbedRun, Outcome, whole_lines
from learner.chaos.schedule import schedule

OPTIONS = "options.json"
SMOKE = (
    *("--quick", "--alignment.iterations", "24", "--evaluation.every", "12", "--checkpoint.every", "6"),
    *("--evaluation.teacher", "false", "--learner.threads", "1"),
)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m learner.chaos",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", type=user_path, required=True, metavar="DIR", help="where both runs are written")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments (default 0)")
    parser.add_argument("--injections", type=int, default=8, help="number of faults (default 8)")
    parser.add_argument("--minutes", type=some_time, default=30.0, help="a run that takes longer hangs (default 30)")
    parser.add_argument("options", nargs="*", help="options of `rtdmd train`, after --")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    """Raises LearnerError if the disturbed run failed, or ended otherwise."""
    if arguments.injections < 1:
        raise ConfigError(f"--injections {arguments.injections}: name at least 1")
    folder, options = arguments.run_dir, tuple(arguments.options) or SMOKE
    undisturbed, disturbed = folder / "undisturbed", folder / f"seed-{arguments.seed}"
    if disturbed.exists():
        raise ConfigError(f"{disturbed} is there already: name another --seed or --run-dir")
    _require_same_options(folder / OPTIONS, options)
    if not (undisturbed / "summary.json").exists():
        print("the undisturbed run")
        list(DisturbedRun(options, undisturbed, 60 * arguments.minutes).run())
    iterations = sum(line["kind"] == "train" for line in whole_lines(undisturbed / "metrics.jsonl"))
    started, outcomes, problems = time.monotonic(), list[Outcome](), list[str]()
    run = DisturbedRun(options, disturbed, 60 * arguments.minutes)
    try:
        for outcome in run.run(schedule(arguments.seed, arguments.injections, iterations)):
            print(outcome)
            outcomes.append(outcome)
        problems = differences(disturbed, undisturbed)
    except LearnerError as error:
        problems = [str(error)]
    result = {
        "seed": arguments.seed,
        "options": list(options),
        "seconds": round(time.monotonic() - started, 1),
        "starts": run.starts,
        "injections": [_as_json(outcome) for outcome in outcomes],
        "problems": problems,
    }
    write_whole(folder / f"seed-{arguments.seed}.json", json.dumps(result, indent=1).encode())
    if problems:
        raise LearnerError(f"seed {arguments.seed}: {'; '.join(problems)}")
    print(f"the end is that of the undisturbed run, bit for bit, after {sum(one.hit for one in outcomes)} faults")


def _require_same_options(file: Path, options: Sequence[str]) -> None:
    """ConfigError if the undisturbed run of a folder has other options."""
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != list(options):
        raise ConfigError(f"{file.parent} has runs with other options, see {file}: name another --run-dir")
    write_whole(file, json.dumps(list(options)).encode())


def _as_json(outcome: Outcome) -> dict[str, Any]:
    seconds = {"noticed_s": outcome.noticed_s, "next_s": outcome.next_s}
    rounded = {name: None if value is None else round(value, 2) for name, value in seconds.items()}
    return {**asdict(outcome.injection), "hit": outcome.hit, **rounded}


if __name__ == "__main__":
    sys.exit(main())
