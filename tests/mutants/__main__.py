"""Proves that wrong changes to the method's code are caught: every mutant must fail the unit test that it names.

python -m tests.mutants                          each mutant against its own test
python -m tests.mutants --only "NAME"            one of them
python -m tests.mutants --whole --json FILE      each against all unit tests that can reach it (slow)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.mutant import Mutant, TableError
from tests.mutants.runner import Job, Outcome, import_libraries, outcomes
from tests.mutants.table import MUTANTS

TEST_TIMEOUT_S = 60.0
WHOLE_TIMEOUT_S = 3600.0
UNIT_TESTS = "tests/unit"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="NAME", help="the mutant of this name alone")
    parser.add_argument("--whole", action="store_true", help="run all unit tests against each mutant")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was found")
    arguments = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if arguments.only in (None, mutant.name)]
    if not chosen:
        parser.error(f"no mutant is called {arguments.only!r}")
    try:
        for mutant in chosen:
            mutant.source()
        import_libraries()
        with tempfile.TemporaryDirectory(prefix="mutants-") as work:
            _require_passing(chosen, Path(work) / "without")
            records = _run(chosen, Path(work), whole=arguments.whole)
    except TableError as error:
        print(error)
        return 1
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    killed = sum(record["result"] == "killed" for record in records)
    print(f"{killed} passed, {len(records) - killed} failed")
    return int(killed < len(records))


def _require_passing(mutants: Sequence[Mutant], work: Path) -> None:
    """Raise TableError unless the named tests pass on the code as it is."""
    tests = sorted({mutant.test for mutant in mutants})
    jobs = [Job(part, TEST_TIMEOUT_S * 5) for part in (tests[: len(tests) // 2], tests[len(tests) // 2 :]) if part]
    for outcome in outcomes(jobs, work):
        verdict = outcome.verdict
        if verdict is None or verdict.exit_code != 0:
            raise TableError(f"the named tests do not pass without mutation:\n{outcome.output}")


def _run(mutants: Sequence[Mutant], work: Path, *, whole: bool) -> list[dict[str, object]]:
    if whole:
        jobs = [Job([UNIT_TESTS], WHOLE_TIMEOUT_S, mutant) for mutant in mutants]
    else:
        jobs = [Job([mutant.test, "-x"], TEST_TIMEOUT_S, mutant) for mutant in mutants]
    records = []
    for outcome in outcomes(jobs, work):
        assert outcome.job.mutant is not None
        result, detail = _result(outcome)
        tests = f", {len(outcome.verdict.failed)} tests fail" if whole and outcome.verdict is not None else ""
        print(f"{result:8} {outcome.seconds:5.1f} s  {outcome.job.mutant.name}{tests}", flush=True)
        if detail:
            print(f"         {detail}", flush=True)
        records.append(
            {
                "name": outcome.job.mutant.name,
                "result": result,
                "seconds": round(outcome.seconds, 1),
                "failing": [] if outcome.verdict is None else outcome.verdict.failed,
                "broken": {} if outcome.verdict is None else outcome.verdict.broken,
            }
        )
    return records


def _result(outcome: Outcome) -> tuple[str, str]:
    """killed, SURVIVED or ERROR, and why it is an error."""
    verdict = outcome.verdict
    if verdict is None:
        return "ERROR", outcome.output
    if not verdict.served:
        return "ERROR", "its test never imports the mutated file"
    if verdict.failed:
        return "killed", ""
    if verdict.broken:
        return "ERROR", f"not by an assertion: {next(iter(verdict.broken.items()))}"
    if verdict.exit_code not in (0, 1) or not verdict.passed:
        return "ERROR", f"pytest ended with {verdict.exit_code}: {outcome.output}"
    return "SURVIVED", ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
