"""OMP_WAIT_POLICY in the processes of a run with a cluster of its own, read from /proc.

`test_service_faults.py` has the same for a shared cluster.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from common import WAIT_POLICY
from tests.helpers.running_service import Run
from tests.helpers.waiting import wait_until

PARTS = ("ray::Learner", "ray::RolloutWorker", "-m reward_servers")


def policies(run: Run) -> set[tuple[str, str]]:
    """The value in the environment of each process of a dry run, with the part of the command line that is known."""
    found: set[tuple[str, str]] = set()

    def every_part_seen() -> bool:
        assert run.process.poll() is None, run.output
        for process in run.processes():
            for part in (part for part in PARTS if part in process.command):
                with suppress(OSError):  # it has ended since
                    lines = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
                    values = [line.partition("=")[2] for line in lines if line.startswith(f"{WAIT_POLICY}=")]
                    found.add((part, " ".join(values)))
        return {part for part, _ in found} == set(PARTS)

    wait_until(every_part_seen, "learner, workers and reward servers", every=0.2)
    run.finish()
    return found


@pytest.mark.slow
def test_it_reaches_all_processes_of_a_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WAIT_POLICY, raising=False)
    run = Run(config, tmp_path / "run", "--dry-run")
    assert policies(run) == {(part, "PASSIVE") for part in PARTS}
