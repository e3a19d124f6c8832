"""Seconds of a cold-start iteration of the shapes world by threads and OMP_WAIT_POLICY, beside busy processes.

    python -m benchmarks.idle_threads [--busy 1] [--iterations 3] [--rounds 2]

Every way runs in a process of its own, one after the other in every round. Prints the median, least and most seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from common import WAIT_POLICY

WAYS = {"1 thread": (1, "PASSIVE"), "2 threads, PASSIVE": (2, "PASSIVE"), "2 threads, not set": (2, "")}
# torch comes first, because our own packages set the variable.
CHILD = "import torch; from benchmarks.idle_threads import iterate; iterate({threads}, {iterations})"
BUSY = "while True: pass"


def iterate(threads: int, iterations: int) -> None:
    """Print the seconds of each iteration, but for the first."""
    import torch

    from common.backbones import load_backbone
    from common.prompts import load_prompts
    from learner.preflight.command_line import parse
    from learner.training.cold_start_trainer import ColdStartTrainer
    from learner.training.networks import Networks, StageSettings

    torch.set_num_threads(threads)
    config = parse([], {}).config
    backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    networks = Networks(backbone, StageSettings.of(config.cold_start), config.run.seed)
    prompts, guidance = load_prompts(config.prompts.train), config.backbone.guidance_scale
    trainer = ColdStartTrainer(networks, config.cold_start, config.sampling, guidance, prompts, config.run.seed)
    seconds = []
    for iteration in range(iterations + 1):
        started = time.perf_counter()
        trainer.update(iteration)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds[1:]))


def measured(way: str, iterations: int) -> list[float]:
    threads, policy = WAYS[way]
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    environment |= {WAIT_POLICY: policy} if policy else {}
    command = [sys.executable, "-c", CHILD.format(threads=threads, iterations=iterations)]
    seconds: list[float] = json.loads(subprocess.check_output(command, env=environment).splitlines()[-1])
    return seconds


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes compute until the block ends."""
    with ExitStack() as stack:
        for _ in range(number):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(busy.kill)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle_threads", description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=1, help="processes that compute beside it")
    parser.add_argument("--iterations", type=int, default=3, help="measured per process, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with busy_processes(arguments.busy):
        for _ in range(arguments.rounds):
            for way in WAYS:
                found[way] += measured(way, arguments.iterations)
    for way, seconds in found.items():
        print(f"{way:20} {statistics.median(seconds):6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
