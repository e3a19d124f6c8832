"""Counts kernels, bytes, FLOPs, copies and waits of full-size models on a GPU, without a GPU. Prints JSON.

    python -m benchmarks.count [MODEL ...] [--batch 24] [--out FILE]

Passes, without gradients:

    plain       the diffusers transformer alone, as its pipeline calls it
    teacher     the backbone without adapters
    student     the backbone with the two adapters of stage 2; the fake score of stage 2 is such a stack too
    group       a sampled group of this batch: four steps of the student

Gradients of a micro-batch of the published run file, by the trainer's own code without checkpointing:

    fake_update       the fake score with its regulariser
    student_update    two policy steps, the last step with its decoded images, rewards and matching

Values that are kept for the backward pass, which the forecast of memory is made of:

    block       of the student of stage 2, per token, hidden unit and block
    vae         of the decoder, per pixel and channel of its last stage

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
from benchmarks.counted_update import count_update
from benchmarks.counting import DEVICE, Counts, counted, kept_bytes
from benchmarks.random_pipelines import in_bfloat16
from benchmarks.weightless import MODELS, SIDE
from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import DiffusersBackbone
from common.backbones.flux2 import image_positions, text_positions
from common.types import Network, Prompt, StepPlan
from rollout_workers.sampler import sample_group

STEPS, ETA = 4, 0.9
STACK = ("cold_start", "aligned")
"""The student's adapters in stage 2; the second is trained."""
PROMPT = Prompt(0, "a red circle")
MICRO_BATCH = {"sd35_medium": 16, "flux2_klein_4b": 8}
"""Samples of a micro-batch in `deploy/runs`."""
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


def updates(model: str, layers: int | None = None) -> dict[str, Counts]:
    """The counts of a micro-batch's two gradients; see the module's docstring."""
    backbone = MODELS[model].backbone(layers)
    return count_update(backbone, StepPlan(0, backbone.sigmas(STEPS), ETA, (0, 1)), MICRO_BATCH[model])


def add_student(backbone: DiffusersBackbone[Any]) -> None:
    """The student's stack of stage 2, with its copies of the weights made."""
    for name in STACK:
        backbone.adapters.add(name, seed=0, trainable=False)
    backbone.adapters.define(Network.STUDENT, STACK)
    with backbone.adapters.active(Network.STUDENT):
        pass


def kept(model: str, layers: int | None = None) -> dict[str, float]:
    """Values that a sample's backward passes keep, by part; see the module's docstring."""
    full_size, number = MODELS[model], torch.bfloat16.itemsize
    backbone = full_size.backbone(layers)
    for name in STACK:
        backbone.adapters.add(name, seed=0, trainable=name == STACK[-1])
    backbone.adapters.define(Network.STUDENT, STACK)
    conditioning, batch = backbone.encode_prompts([PROMPT.text] * 2), 2
    latents, sigma = torch.empty(batch, *backbone.latent_shape, device=DEVICE), torch.empty(batch, device=DEVICE)
    weights = [weight for module in backbone.adapters.modules() for weight in module.parameters()]
    (transformer,) = backbone.adapters.modules()
    settings: Any = transformer.config
    tokens = latents[0, 0].numel() // (settings.patch_size or 1) ** 2 + len(conditioning.tensors["tokens_BLd"][0])
    units = settings.num_attention_heads * settings.attention_head_dim
    blocks = settings.num_layers + settings.get("num_single_layers", 0)
    block = kept_bytes(lambda: backbone.velocity(Network.STUDENT, latents, sigma, conditioning), weights)
    with DEVICE:
        vae: Any = in_bfloat16(full_size.build_vae).requires_grad_(False)
    side = SIDE // 2 ** (len(vae.config.block_out_channels) - 1)
    z = torch.empty(batch, vae.config.latent_channels, side, side, dtype=torch.bfloat16, device=DEVICE)
    decoded = kept_bytes(lambda: vae.decode(z.requires_grad_()).sample, vae.parameters())
    return {
        "block": block / number / batch / (tokens * units * blocks),
        "vae": decoded / number / batch / (SIDE**2 * vae.config.block_out_channels[0]),
    }


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
        counts = count(model, arguments.batch, arguments.layers) | updates(model, arguments.layers)
        passes = {name: {key: round(value, 2) for key, value in asdict(each).items()} for name, each in counts.items()}
        ratios = over(counts["student"], counts["plain"])
        kept_values = {name: round(value, 1) for name, value in kept(model, arguments.layers).items()}
        rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
        found[model] = passes | {"kept": kept_values, "over_plain": rounded}
    show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
