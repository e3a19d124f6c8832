"""Two ratios of one run: how much the service costs over a bare loop, and how much of a step is orchestration.

    python benchmarks/throughput.py [--config deploy/runs/shapes.yaml] [--iterations 8]

rollout_ratio        images/s of the rollout actors, while they roll out, over images/s of a bare loop in one process
                     that has all the cores (sampling and decoding in both)
orchestration_share  what is neither rollout, decoding, attesting weights nor update, as a part of a step: with it the
                     scoring that no other group's sampling hides

Runs a short real run (real Ray, real reward servers), then the bare loop, on the same machine. Prints one JSON object.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.backbones import load_backbone
from common.backbones.base import Backbone
from common.command import user_path
from common.config.run import Config
from common.prompts import load_prompts
from common.types import Network, Prompt, StepPlan
from learner.preflight.command_line import parse
from learner.training.networks import COLD_START
from rollout_workers.sampler import sample_group

PROJECT_ROOT = Path(__file__).resolve().parents[1]
WARM_ITERATIONS = 2
"""First iterations left out: they allocate, load and compile what later ones reuse."""


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory() as directory:
        records = _short_run(arguments, Path(directory) / "run")
    config = parse(["--config", str(arguments.config)], {}).config
    images = config.alignment.prompts_per_iteration * config.alignment.group_size
    workers = config.workers.most
    # All workers sample at once, so the iteration's sampling takes the sum of their seconds over their number.
    actors = statistics.median(images * workers / (r["worker_rollout"] + r["worker_decode"]) for r in records)
    bare = _bare_loop(config)
    share = statistics.median(_orchestration(record, workers) for record in records)
    print(
        json.dumps(
            {
                "benchmark": "throughput",
                "actors_images_per_s": round(actors, 2),
                "bare_loop_images_per_s": round(bare, 2),
                "rollout_ratio": round(actors / bare, 3),
                "orchestration_share": round(share, 4),
                "median_step_s": round(statistics.median(record["step"] for record in records), 3),
                "cpus": os.cpu_count(),
            },
            indent=1,
        )
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=user_path, default=PROJECT_ROOT / "deploy/runs/shapes.yaml")
    parser.add_argument("--iterations", type=int, default=8, help="iterations of the short run")
    return parser.parse_args()


def _short_run(arguments: argparse.Namespace, run_dir: Path) -> list[dict[str, float]]:
    command = [sys.executable, str(PROJECT_ROOT / "learner/main.py"), "--config", str(arguments.config)]
    command += ["--run-dir", str(run_dir), "--cold_start.iterations=0"]
    command += [f"--alignment.iterations={arguments.iterations + WARM_ITERATIONS}", "--evaluation.final_prompts=4"]
    command += ["--evaluation.every=1000", "--checkpoint.every=1000"]
    subprocess.run(command, check=True, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if line["stage"] == "alignment" and line["kind"] == "train"][
        WARM_ITERATIONS:
    ]


def _orchestration(seconds: dict[str, float], workers: int) -> float:
    """The part of a step in which neither the workers' models (at their mean) nor the learner worked."""
    sampling = sum(seconds[f"worker_{part}"] for part in ("weights", "rollout", "decode", "statistics")) / workers
    updating = sum(value for part, value in seconds.items() if part.startswith("update_"))
    return max(0.0, 1 - (sampling + updating) / seconds["step"])


def _bare_loop(config: Config, groups: int = 12) -> float:
    """Images/s of the same sampling and decoding in this process, with every core."""
    torch.set_num_threads(os.cpu_count() or 1)
    backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    backbone.adapters.add(COLD_START, seed=0, trainable=False)
    backbone.adapters.define(Network.STUDENT, (COLD_START,))
    prompts = load_prompts(config.prompts.train)
    plan = StepPlan(0, backbone.sigmas(config.sampling.steps), config.sampling.eta, (0, 1))
    size = config.alignment.group_size
    for prompt in prompts[:2]:
        _sample_and_decode(backbone, prompt, plan, size)
    started = time.perf_counter()
    for prompt in prompts[:groups]:
        _sample_and_decode(backbone, prompt, plan, size)
    return groups * size / (time.perf_counter() - started)


@torch.no_grad()
def _sample_and_decode(backbone: Backbone, prompt: Prompt, plan: StepPlan, size: int) -> None:
    sampled = sample_group(backbone, prompt, plan, seed=0, group_size=size)
    backbone.decode(sampled.latents_SGchw[-1])


if __name__ == "__main__":
    main()
