"""Counts kernels, bytes, FLOPs, copies and waits of full-size models on a GPU, without a GPU. Prints JSON.

    python -m benchmarks.count [MODEL ...] [--batch 24] [--out FILE]

Passes, without gradients:

    plain       the diffusers transformer alone, as its pipeline calls it
    teacher     the backbone without adapters
    student     the backbone with the two adapters of stage 2; the fake score of stage 2 is such a stack too
    group       a sampled group of this batch: four steps of the student

`over_plain` is the student's pass over the plain one. `waits` are copies and reads for which the host waits for the
device, after the first kernel and before the last. The model of the time is in `benchmarks/counting.py`.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.as_json import add_out, show
from benchmarks.counting import DEVICE, Counts, counted
from benchmarks.weightless import MODELS
from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import DiffusersBackbone
from common.backbones.flux2 import image_positions, text_positions
from common.types import Network, Prompt, StepPlan
from rollout_workers.sampler import sample_group

STEPS, ETA = 4, 0.9
PROMPT = Prompt(0, "a red circle")
COMPARED = ("kernels", "elementwise_gb", "modelled_ms")


def count(model: str, batch: int, layers: int | None = None) -> dict[str, Counts]:
    """The counts of a model's passes, by their name; `layers` as of `FullSize.backbone`."""
    backbone = MODELS[model].backbone(layers)
    conditioning = backbone.encode_prompts([PROMPT.text] * batch)
    latents, sigma = torch.empty(batch, *backbone.latent_shape, device=DEVICE), torch.empty(batch, device=DEVICE)

    def velocity(network: Network) -> Counts:
        return counted(lambda: backbone.velocity(network, latents, sigma, conditioning))

    plain = counted(_plain_pass(model, backbone, conditioning, latents, sigma))
    teacher = velocity(Network.TEACHER)
    add_student(backbone)
    plan = StepPlan(0, backbone.sigmas(STEPS), ETA, (0, 1))
    group = counted(lambda: sample_group(backbone, PROMPT, plan, seed=0, group_size=batch))
    return {"plain": plain, "teacher": teacher, "student": velocity(Network.STUDENT), "group": group}


def add_student(backbone: DiffusersBackbone[Any]) -> None:
    """The student's stack of stage 2, with its copies of the weights made."""
    stack = ("cold_start", "aligned")
    for name in stack:
        backbone.adapters.add(name, seed=0, trainable=False)
    backbone.adapters.define(Network.STUDENT, stack)
    with backbone.adapters.active(Network.STUDENT):
        pass


def _plain_pass(
    model: str,
    backbone: DiffusersBackbone[Any],
    conditioning: Conditioning,
    latents: torch.Tensor,
    sigma: torch.Tensor,
) -> Callable[[], object]:
    """The call of the transformer in the diffusers pipeline."""
    (transformer,) = backbone.adapters.modules()
    tokens, latents = conditioning.tensors["tokens_BLd"], latents.bfloat16()
    inputs: dict[str, Any] = {"timestep": sigma, "encoder_hidden_states": tokens, "return_dict": False}
    if model == "sd35_medium":
        inputs |= {"hidden_states": latents, "pooled_projections": conditioning.tensors["pooled_Bd"]}
    else:
        height, width = latents.shape[2:]
        inputs |= {
            "hidden_states": latents.flatten(2).transpose(1, 2).contiguous(),
            "guidance": None,
            "img_ids": image_positions(height, width, DEVICE),
            "txt_ids": text_positions(tokens.shape[1], DEVICE),
        }
    return lambda: transformer(**inputs)


def over(counts: Counts, plain: Counts) -> dict[str, float]:
    """The counts that the two are compared by, as ratios."""
    each, base = asdict(counts), asdict(plain)
    return {name: each[name] / base[name] for name in COMPARED}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, default=24, metavar="N", help="samples per pass (default 24)")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of each kind, where not as many as published")
    add_out(parser)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "count", "batch": arguments.batch}
    for model in arguments.models:
        counts = count(model, arguments.batch, arguments.layers)
        passes = {name: {key: round(value, 2) for key, value in asdict(each).items()} for name, each in counts.items()}
        ratios = over(counts["student"], counts["plain"])
        found[model] = passes | {"over_plain": {name: round(ratio, 3) for name, ratio in ratios.items()}}
    show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
