"""Runs an arm with a seed as a whole run, and keeps what the tables need of it as one JSON file.

A finished arm is read, not repeated; an interrupted one is resumed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from benchmarks.claims.arms import CLAIMS, Arm
from common.whole_files import write_whole

PROJECT_ROOT = Path(__file__).resolve().parents[2]
POLL_S = 2.0


@dataclass(frozen=True)
class Places:
    """Folders of the runs themselves, which are large, and of what is kept of them."""

    runs: Path
    results: Path

    def run(self, claim: str, arm: str, seed: int) -> Path:
        return self.runs / claim / f"{arm}-{seed}"

    def result(self, claim: str, arm: str, seed: int) -> Path:
        return self.results / claim / f"{arm}-{seed}.json"


def run_arm(claim: str, name: str, seed: int, places: Places) -> dict[str, Any]:
    """The result of an arm; it and the start that it needs are run if they were not.

    Raises:
        CalledProcessError: a run failed; its console output is in ARM-SEED.log beside its folder.
    """
    kept = places.result(claim, name, seed)
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    return _run_and_keep(claim, name, seed, places)


def _run_and_keep(claim: str, name: str, seed: int, places: Places) -> dict[str, Any]:
    """The result of an arm, which replaces a kept one. Errors as in `run_arm`."""
    kept, arm = places.result(claim, name, seed), _arm(claim, name)
    options = {**CLAIMS[claim].common, **arm.options, "run.seed": seed, "run.name": f"claim-{claim}-{name}-{seed}"}
    if arm.start is not None:
        options["cold_start.from_checkpoint"] = cold_start_of(claim, arm.start, seed, places)
    run_dir = places.run(claim, name, seed)
    seconds = run_service(CLAIMS[claim].config, options, run_dir)
    result = {"claim": claim, "arm": name, "seed": seed, "cpu_seconds": seconds, **_read(run_dir, options)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, (json.dumps(result) + "\n").encode())
    return result


def _arm(claim: str, name: str) -> Arm:
    return {**CLAIMS[claim].preparing, **CLAIMS[claim].arms}[name]


def cold_start_of(claim: str, name: str, seed: int, places: Places) -> str:
    """The last checkpoint of another arm's cold start, which is made if it is not there."""
    checkpoints = places.run(claim, name, seed) / "checkpoints"
    if not (places.run(claim, name, seed) / "summary.json").exists():
        _run_and_keep(claim, name, seed, places)
    return str(max(checkpoints.glob("cold_start-*")))


def run_service(config: str, options: dict[str, object], run_dir: Path) -> float | None:
    """Run or resume until the summary is there; return the processor seconds that this took, of all processes.

    None if they are not known: this command was killed, and the run went on alone.
    """
    before = run_dir / "cpu.json"
    if (run_dir / "summary.json").exists():
        return float(json.loads(before.read_text())) if before.exists() else None
    spent = float(json.loads(before.read_text())) if before.exists() else 0.0
    command = [sys.executable, str(PROJECT_ROOT / "learner/main.py"), "--config", str(PROJECT_ROOT / config)]
    command += ["--run-dir", str(run_dir), *(f"--{key}={_text(value)}" for key, value in options.items())]
    if (run_dir / "config.yaml").exists():
        command.append("--resume")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.parent / f"{run_dir.name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=output, stderr=output)
        used = _Used(process.pid)
        try:
            status = process.wait()
        finally:
            used.stop()
            if run_dir.exists():
                before.write_text(json.dumps(spent + used.seconds))
    if status:
        raise subprocess.CalledProcessError(status, command)
    return spent + used.seconds


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Used:
    """Processor seconds of a process and its descendants: the largest that was seen of each, summed."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}
        self._end = Event()
        self._poller = Thread(target=self._poll, daemon=True)
        self._poller.start()

    @property
    def seconds(self) -> float:
        return sum(self._seen.values())

    def stop(self) -> None:
        self._end.set()
        self._poller.join()

    def _poll(self) -> None:
        while not self._end.wait(POLL_S):
            try:
                found = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:  # the run has ended
                return
            for one in found:
                try:
                    times = one.cpu_times()
                    self._seen[one.pid, one.create_time()] = times.user + times.system
                except psutil.Error:  # it has ended
                    continue


def _read(run_dir: Path, options: dict[str, object]) -> dict[str, Any]:
    """Settings, periodic evaluations, signals and the final table's scores of a finished run."""
    summary = json.loads((run_dir / "summary.json").read_text())
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    policies = {}
    for policy in summary["policies"]:
        if policy == "rtdmd" and options["alignment.iterations"] == 0:
            continue  # it is the cold start again
        record = json.loads((run_dir / "samples/policies" / f"{policy}.json").read_text())
        policies[policy] = {key: record[key] for key in ("metrics", "diversity", "scores")}
    return {
        "options": {key: str(value) for key, value in options.items() if key != "cold_start.from_checkpoint"},
        "seconds": summary["seconds"],
        "curve": [event for event in events if event["kind"] == "evaluation"],
        "signals": [event for event in events if any(key.startswith("signal_") for key in event["metrics"])],
        "policies": policies,
    }
