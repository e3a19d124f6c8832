"""Whole runs as a user starts them: `python learner/main.py` in a process of its own, watched through /proc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.shared_services import Cluster
from tests.helpers.waiting import wait_until

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 180.0
PROMPTS = ("red", "blue", "a dot", "two", "big", "small", "a line", "green")


@dataclass(frozen=True)
class Process:
    """A process by id and start time, so that a reused id is not taken for it."""

    pid: int
    started: str
    command: str = field(compare=False)

    @property
    def alive(self) -> bool:
        found = _process(self.pid)
        return found is not None and found.started == self.started


def _process(pid: int) -> Process | None:
    """A process as /proc describes it; None if it is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else Process(pid, fields[18], command)


def descendants(root: int) -> list[Process]:
    """Every living process below `root`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        waiting += below
        found += [process for process in map(_process, below) if process is not None]
    return found


ACTORS = ("ray::RolloutWorker", "ray::Learner")
"""Ray shows the actors of a run under these names."""


class Run:
    """One start of `learner/main.py` into a run directory, in a shared cluster or in one of its own."""

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        *options: str,
        cluster: Cluster | None = None,
        working_directory: Path = PROJECT_ROOT,
    ) -> None:
        self.run_dir = run_dir
        self._cluster = cluster
        self._log = run_dir.with_name(f"{run_dir.name}.log")
        environment = os.environ | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {} if cluster is None else cluster.environment
        script = str(PROJECT_ROOT / "learner" / "main.py")
        command = [sys.executable, script, "--config", str(config), "--run-dir", str(run_dir), *options]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=working_directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def finish(self, status: int = 0) -> None:
        """Wait for the end, and for everything it started to be gone."""
        below = self.processes()
        found = self.process.wait(DEADLINE)
        assert found == status, self.output
        wait_until(lambda: not any(process.alive for process in below), "every process of the run to end")

    def processes(self, part_of_command: str = "") -> list[Process]:
        """Processes of this run. A shared cluster has one run at a time, so all its actors belong to this run."""
        started = descendants(self.process.pid)
        if self._cluster is not None:
            started += [process for process in descendants(self._cluster.pid) if process.command.startswith(ACTORS)]
        return [process for process in started if part_of_command in process.command]

    def move(self, run_dir: Path) -> None:
        """Move what a finished run has left; the log stays."""
        shutil.move(self.run_dir, run_dir)
        self.run_dir = run_dir

    def wait_for_lines(self, count: int, stage: str | None = None) -> None:
        """Until so many metrics lines are written; with a stage, so many iterations of it."""

        def written() -> bool:
            assert self.process.poll() is None, self.output
            lines = self.lines() if self._metrics.exists() else []
            counted = [line for line in lines if stage is None or (line["stage"], line["kind"]) == (stage, "train")]
            return len(counted) >= count

        wait_until(written, f"{count} lines of {self._metrics}")

    def kill(self) -> list[Process]:
        """SIGKILL the driver alone; returns what it had started."""
        below = self.processes()
        self.process.kill()
        self.process.wait(DEADLINE)
        return below

    @property
    def _metrics(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        return [json.loads(line) for line in self._metrics.read_text().split("\n")[:-1]]

    def metrics(self) -> list[tuple[str, int, str, dict[str, float]]]:
        """All that must be equal in equal runs: everything but the seconds."""
        return [(line["stage"], line["iteration"], line["kind"], line["metrics"]) for line in self.lines()]

    def ends(self) -> list[tuple[int, int, str]]:
        """Every line of ledger.jsonl: iteration, prompt, outcome."""
        lines = [json.loads(line) for line in (self.run_dir / "ledger.jsonl").read_text().splitlines()]
        return [(line["iteration"], line["prompt"], line["outcome"]) for line in lines]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary


@dataclass(frozen=True)
class Service:
    """A run file for the tiny pipeline, and running servers of its rewards."""

    config: Path
    reward_urls: dict[str, str]
    cluster: Cluster

    def run(self, name: str, *options: str) -> Run:
        """Start a run, or resume one, on the shared services."""
        urls = [f"--rewards.{reward}.url={url}" for reward, url in self.reward_urls.items()]
        return Run(self.config, self.config.parent / name, *urls, *options, cluster=self.cluster)


def assert_equal_runs(run: Run, other: Run) -> None:
    assert run.metrics() == other.metrics()
    assert run.ends() == other.ends()
    assert run.summary()["policies"] == other.summary()["policies"]


def write_config(path: Path, pipeline: Path, hps: Path, prompts: Sequence[str]) -> Path:
    """A run file of a few seconds: the tiny pipeline, one tiny HPS model, one scorer without a model.

    Every request is a whole batch of its server, so that scores cannot depend on traffic.
    """
    (path.parent / "prompts.txt").write_text("\n".join(prompts) + "\n")
    whole_group = 4
    config = {
        "run": {"name": "tiny", "seed": 3},
        "backbone": {"path": str(pipeline), "max_sequence_length": 10, "dtype": "float32", "guidance_scale": 3.0},
        "lora": {"rank": 2, "alpha": 4},
        "prompts": {"train": str(path.parent / "prompts.txt"), "evaluation": str(path.parent / "prompts.txt")},
        "cold_start": {
            "iterations": 4,
            "batch_size": 4,
            "student_every": 2,
            "learning_rate_student": 1e-3,
            "learning_rate_fake": 1e-3,
        },
        "alignment": {
            "iterations": 8,
            "prompts_per_iteration": 4,
            "group_size": whole_group,
            "micro_batch": 8,
            "learning_rate_student": 1e-3,
            "ema_every": 2,
        },
        "rewards": [
            {"name": "hps", "scorer": "hps", "model": str(hps), "differentiable": True, "max_batch": whole_group},
            {
                "name": "bright",
                "scorer": "tests.helpers.toy_scorers:BrightnessScorer",
                "differentiable": True,
                "max_batch": whole_group,
            },
        ],
        "workers": {"count": 1, "num_cpus": 0.1},
        "learner": {"num_cpus": 0.1, "threads": 1},
        "evaluation": {
            "every": 3,
            "prompts": 5,
            "images_per_prompt": whole_group,
            "teacher_steps": 6,
            "teacher_guidance": 3.0,
            "grid_prompts": 2,
            "final_prompts": 6,
            "final_images_per_prompt": whole_group,
        },
        "checkpoint": {"every": 2},
        "reward_client": {"timeout_s": 20.0, "attempts": 2},
    }
    path.write_text(yaml.safe_dump(config))
    return path
