"""Compares the noise in the gradients of SubGRPO and all-step GRPO, at a fixed student of the shapes world.

    python -m benchmarks.claims.variance [--cold-start CHECKPOINT] [--reference 32] [--batches 32] --out FILE

Without a checkpoint the student is the teacher in four steps. The reference is the mean gradient of `--reference`
batches of all-step GRPO with one reward, the detector. Every arm then takes batches of its own. Of each batch's
gradient, summed over the trained steps, the component along the reference is kept:

    signal-to-noise = mean / standard deviation of that component over the batches

A batch has 12 x 16 samples, and the larger half of the advantages is trained on, as in claim B. Prints JSON, with
processor seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.as_json import add_out, show
from common import seeding
from common.backbones import load_backbone
from common.command import user_path
from common.config.run import Config
from common.prompts import load_prompts
from common.types import PolicyVersion, Prompt, StepPlan, TrajectoryGroup
from learner.checkpoint import Checkpoint
from learner.objectives.advantage import group_advantages
from learner.preflight.command_line import parse
from learner.training.alignment_batch import assemble
from learner.training.networks import Networks, StageSettings
from learner.training.policy_gradient import policy_loss
from learner.training.ranks import ALONE
from rollout_workers.sampler import decode_to_uint8, sample_group
from zoo.detector import DetectorScorer

GROUPS, GROUP_SIZE, FRACTION = 12, 16, 0.5
STOCHASTIC = 3
REFERENCE_SEED = 1_000


@dataclass(frozen=True)
class Arm:
    """The number of selected steps (None: all of them), and whether a group shares its initial noise."""

    selected: int | None
    same_latent: bool = False


ARMS = {
    "grpo": Arm(None),
    "subgrpo_2": Arm(2),
    "subgrpo_1": Arm(1),
    "subgrpo_2_same_latent": Arm(2, same_latent=True),
    "grpo_same_latent": Arm(None, same_latent=True),
}


class Gradients(Protocol):
    """Gives the gradient of a batch."""

    def gradient(self, arm: Arm, seed: int, iteration: int) -> Tensor: ...


class Student:
    """A fixed student, the scorer, and the gradients of batches."""

    def __init__(self, config: Config, cold_start: Path | None) -> None:
        self._config = config
        self._backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
        self._networks = Networks(self._backbone, StageSettings.of(config.cold_start), config.run.seed)
        if cold_start is not None:
            self._networks.load(Checkpoint.open(cold_start).state())
        self._networks.begin_alignment(StageSettings.of(config.alignment))
        self._prompts = load_prompts(config.prompts.train)
        self._scorer = DetectorScorer.load(Path("zoo/weights/detector"), "cpu")

    def gradient(self, arm: Arm, seed: int, iteration: int) -> Tensor:
        """The summed gradient of a batch's trained steps, [n]."""
        selected = tuple(range(STOCHASTIC))
        if arm.selected is not None:
            selected = seeding.selected_steps(seed, iteration, STOCHASTIC, arm.selected)
        plan = StepPlan(iteration, self._backbone.sigmas(STOCHASTIC + 1), 0.9, selected, arm.same_latent)
        chosen = seeding.prompt_indices(seed, iteration, GROUPS, len(self._prompts))
        groups = [self._group(self._prompts[index], plan, seed) for index in chosen]
        rewards_PG = torch.stack([rewards for _, rewards in groups])
        advantages_PG = group_advantages({"detector": rewards_PG}, {"detector": 1.0}, "batch", 5.0)
        batch = assemble([group for group, _ in groups], advantages_PG, FRACTION, ALONE, self._backbone)
        adapter = self._networks.student
        adapter.clear_gradient()
        for step in selected:
            for start in range(0, len(batch), 32):
                rows = slice(start, min(start + 32, len(batch)))
                loss, _ = policy_loss(self._backbone, self._config.alignment, batch, step, rows)
                (loss * (rows.stop - rows.start) / len(batch)).backward()
        return adapter.gradient_n.clone()

    def _group(self, prompt: Prompt, plan: StepPlan, seed: int) -> tuple[TrajectoryGroup, Tensor]:
        sampled = sample_group(self._backbone, prompt, plan, seed=seed, group_size=GROUP_SIZE)
        images_GHWC = decode_to_uint8(self._backbone, sampled.latents_SGchw[-1])
        rewards_G = self._scorer.score(images_GHWC, [prompt.text] * GROUP_SIZE, [{}] * GROUP_SIZE)
        states, surrogates = sampled.latents_SGchw.numpy(), sampled.surrogate_TG.numpy()
        return TrajectoryGroup(prompt, plan, PolicyVersion(0, "fixed"), states, surrogates), torch.tensor(rewards_G)


def measured(student: Gradients, reference_n: Tensor, arm: Arm, batches: Iterator[int], seed: int) -> dict[str, float]:
    """The component of the arm's gradients along the reference."""
    started = time.process_time()
    direction_n = reference_n / reference_n.norm()
    components, norms = [], []
    for iteration in batches:
        gradient_n = student.gradient(arm, seed, iteration)
        components.append(float(gradient_n @ direction_n))
        norms.append(float(gradient_n.norm()))
    mean, spread, count = statistics.fmean(components), statistics.stdev(components), len(components)
    seconds = (time.process_time() - started) / count
    return {
        "batches": count,
        "mean": mean,
        "mean_error": spread / count**0.5,
        "spread": spread,
        "signal_to_noise": mean / spread,
        "norm": statistics.fmean(norms),
        "cpu_seconds_per_batch": seconds,
        "signal_to_noise_per_root_cpu_second": mean / spread / seconds**0.5,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims.variance", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--cold-start", type=user_path, help="checkpoint of the student; without it the teacher")
    parser.add_argument("--reference", type=int, default=32, help="batches of the reference gradient (default 32)")
    parser.add_argument("--batches", type=int, default=32, help="batches of each arm (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student = Student(parse(["--config", "deploy/runs/shapes_finished.yaml"], {}).config, arguments.cold_start)
    reference_n = torch.zeros(())
    for iteration in range(arguments.reference):
        reference_n = reference_n + student.gradient(ARMS["grpo"], REFERENCE_SEED + arguments.seed, iteration)
    found: dict[str, object] = {
        "benchmark": "claims.variance",
        "student": "teacher" if arguments.cold_start is None else "cold start",
        "seed": arguments.seed,
        "reference_batches": arguments.reference,
    }
    for name, arm in ARMS.items():
        found[name] = measured(student, reference_n, arm, iter(range(arguments.batches)), arguments.seed)
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
