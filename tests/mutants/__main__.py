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
from tests.mutants.reach import reaching_tests
from tests.mutants.runner import Job, import_libraries, outcomes
from tests.mutants.table import MUTANTS
from tests.mutants.verdict import ERROR, KILLED, Verdict

TEST_TIMEOUT_S = 60.0
WHOLE_TIMEOUT_S = 3600.0


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
            _require_passing(_tests(chosen, whole=arguments.whole), Path(work) / "without")
            records = _run(chosen, Path(work), whole=arguments.whole)
    except TableError as error:
        print(error)
        return 1
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    killed = sum(record["result"] == KILLED for record in records)
    print(f"{killed} passed, {len(records) - killed} failed")
    return int(killed < len(records))


def _tests(mutants: Sequence[Mutant], *, whole: bool) -> list[str]:
    """All that the mutants are run against."""
    if whole:
        return sorted({test for file in {mutant.file for mutant in mutants} for test in reaching_tests(file)})
    return sorted({mutant.test for mutant in mutants})


def _require_passing(tests: Sequence[str], work: Path) -> None:
    """Raise TableError unless the tests pass on the code as it is."""
    jobs = [Job(part, WHOLE_TIMEOUT_S) for part in (tests[::2], tests[1::2]) if part]
    for outcome in outcomes(jobs, work):
        verdict = outcome.verdict
        if verdict is None or verdict.exit_code != 0:
            raise TableError(f"the tests do not pass without mutation:\n{outcome.output}")


def _run(mutants: Sequence[Mutant], work: Path, *, whole: bool) -> list[dict[str, object]]:
    if whole:
        jobs = [Job(reaching_tests(mutant.file), WHOLE_TIMEOUT_S, mutant) for mutant in mutants]
    else:
        jobs = [Job([mutant.test, "-x"], TEST_TIMEOUT_S, mutant) for mutant in mutants]
    records = []
    for outcome in outcomes(jobs, work):
        assert outcome.job.mutant is not None
        verdict = outcome.verdict or Verdict()
        result, detail = (ERROR, outcome.output) if outcome.verdict is None else verdict.judged()
        failing = [*verdict.failed, *verdict.broken]
        line = f"{result:8} {outcome.seconds:5.1f} s  {outcome.job.mutant.name}"
        print(f"{line}: {len(failing)} tests fail" if whole else line, flush=True)
        if detail:
            print(f"         {detail}", flush=True)
        seconds = round(outcome.seconds, 1)
        records.append({"name": outcome.job.mutant.name, "result": result, "seconds": seconds, "failing": failing})
    return records


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
