"""Seconds of a cold-start iteration of the shapes world in this checkout and in another one of this project, in turns.

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before [--busy 1] [--iterations 6] [--rounds 3]

Each checkout is measured as it trains: with the threads of its run file and its own waiting policy. Every round runs
both, each in a process of its own; `--busy` processes compute beside them. Prints JSON: the median, least and most
seconds of each checkout, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.as_json import add_out, show
from benchmarks.idle_threads import busy_processes
from common import WAIT_POLICY

HERE = Path(__file__).resolve().parents[1]
CHILD = """
import json, time, learner, torch
from common.backbones import load_backbone
from common.prompts import load_prompts
from learner.preflight.command_line import parse
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.networks import Networks, StageSettings
config = parse([], {{}}).config
torch.set_num_threads(config.learner.threads)
backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
networks = Networks(backbone, StageSettings.of(config.cold_start), config.run.seed)
prompts, guidance = load_prompts(config.prompts.train), config.backbone.guidance_scale
trainer = ColdStartTrainer(networks, config.cold_start, config.sampling, guidance, prompts, config.run.seed)
seconds = []
for iteration in range({iterations} + 1):
    started = time.perf_counter()
    trainer.update(iteration)
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds[1:]))
"""


def measured(checkout: Path, iterations: int) -> list[float]:
    """Seconds of each iteration, but for the first."""
    environment = {name: value for name, value in os.environ.items() if name not in (WAIT_POLICY, "OMP_NUM_THREADS")}
    environment |= {"PYTHONPATH": str(checkout), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", CHILD.format(iterations=iterations)]
    seconds: list[float] = json.loads(subprocess.check_output(command, env=environment, cwd=checkout).splitlines()[-1])
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it (default 0)")
    parser.add_argument("--iterations", type=int, default=6, help="measured per process, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    add_out(parser)
    arguments = parser.parse_args()
    checkouts = {"here": HERE, "other": arguments.other.resolve()}
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    with busy_processes(arguments.busy):
        for _ in range(arguments.rounds):
            for name, checkout in checkouts.items():
                seconds[name] += measured(checkout, arguments.iterations)
    found: dict[str, Any] = {"benchmark": "against", "busy": arguments.busy}
    for name, each in seconds.items():
        found[name] = {"median_s": statistics.median(each), "least_s": min(each), "most_s": max(each)}
    found["other_over_here"] = found["other"]["median_s"] / found["here"]["median_s"]
    show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
