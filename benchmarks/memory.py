"""Memory of every process of a run over many small iterations of stage 2. Prints JSON.

    python -m benchmarks.memory [--iterations 500] [--run-dir DIR] [--out FILE]

The run is the smoke run of the shapes world with two groups of two samples per iteration. A process counts with what it
alone uses (unique set size), so that shared memory counts once: the object store is the shared memory of Ray's raylet.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.as_json import add_out, show
from common.command import user_path
from common.project_files import PROJECT_ROOT

KINDS = {
    "ray::RolloutWorker": "rollout workers",
    "ray::Learner": "learner",
    "reward_servers": "reward servers",
    "redis-server": "redis",
}
"""Part of a command line -> what the process is. Others are Ray's own."""
SMALL: Mapping[str, object] = {
    "cold_start.iterations": 4,
    "alignment.prompts_per_iteration": 2,
    "alignment.group_size": 2,
    "evaluation.every": 50,
    "evaluation.teacher": "false",
    "checkpoint.every": 50,
    "learner.threads": 1,
}
EVERY_S = 3.0
MIB = 2**20
WARM = 0.2
"""Share of the iterations that count as the start, when caches and allocators fill."""
ROWS = 10

Sample = dict[str, float]


def main() -> int:
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="rtdmd-memory-") as folder:
        run_dir = arguments.run_dir or Path(folder) / "run"
        samples = list(_watched(_command(run_dir, arguments.iterations), run_dir / "metrics.jsonl"))
    show(found(samples, arguments.iterations), arguments.out)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500, help="iterations of stage 2 (default 500)")
    parser.add_argument("--run-dir", type=user_path, help="keep the run here")
    add_out(parser)
    return parser.parse_args()


def _command(run_dir: Path, iterations: int) -> list[str]:
    options = {**SMALL, "alignment.iterations": iterations}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "learner/main.py", "--quick", "--run-dir", str(run_dir), *words]


def _watched(command: Sequence[str], metrics: Path) -> Iterator[Sample]:
    """Run the command; yield its memory by kind of process while it trains stage 2."""
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        done = _aligned(metrics)
        if done > 0:
            yield {"iteration": float(done)} | _memory(process.pid)
        time.sleep(EVERY_S)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def _aligned(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return sum('"alignment"' in line and '"train"' in line for line in lines)


def _memory(pid: int) -> Sample:
    """MiB by kind."""
    driver = psutil.Process(pid)
    found = {"driver": driver.memory_full_info().uss / MIB}
    for child in driver.children(recursive=True):
        try:
            line, memory = " ".join(child.cmdline()), child.memory_full_info()
        except psutil.Error:
            continue  # it has ended
        kind = next((kind for part, kind in KINDS.items() if part in line), "ray")
        found[kind] = found.get(kind, 0.0) + memory.uss / MIB
        if "raylet/raylet" in line:
            found["object store"] = memory.shared / MIB
    return found


def found(samples: Sequence[Sample], iterations: int) -> dict[str, object]:
    """The curve at some iterations, and each kind's growth per 100 iterations after the start."""
    whole = [one for one in samples if len(one) == max(map(len, samples))]  # the others saw the run start or end
    late = [one for one in whole if one["iteration"] >= WARM * iterations]
    kinds = [name for name in whole[0] if name != "iteration"]
    growth = {kind: round(100 * slope([(one["iteration"], one[kind]) for one in late]), 2) for kind in kinds}
    step = max(1, len(whole) // ROWS)
    curve = [{name: round(value, 1) for name, value in one.items()} for one in (*whole[::step], whole[-1])]
    return {"benchmark": "memory", "iterations": iterations, "mib": curve, "mib_per_100_iterations": growth}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares."""
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


if __name__ == "__main__":
    sys.exit(main())
