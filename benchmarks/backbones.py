"""Measures sampling and training at full size, with random weights. Prints one JSON object.

    python -m benchmarks.backbones sd35_medium
    python -m benchmarks.backbones flux2_klein_4b
    python -m benchmarks.backbones sd35_medium --layers 2 --side 128 --group-size 2     # anywhere: does it run?

rollout_ratio       images/s of our sampler and decoder over those of the diffusers pipeline, both 4 steps at one batch
utilisation         of the device's peak by the transformer's passes of one RTDMD update; nothing computed twice counts
peak_gib            of such an update, the VAE's gradient included
publish_ms          from the learner's weights to a sampler that computes with them, attested
surrogate_gap       largest difference between the sampler's surrogate of a step and the learner's
shared_over_copies  weights that student, fake score and teacher hold together, over those of three models

Needs torch, diffusers, transformers, peft and safetensors; not Ray.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_pipelines import MODELS
from common.backbones import load_backbone, model_sizes
from common.backbones.base import Backbone
from common.config.run import Config
from common.config.stages import AlignmentConfig, ColdStartConfig, SamplingConfig
from common.types import PolicyVersion, Prompt, ScoredGroup, StepPlan, TrajectoryGroup
from common.weights import frozen_weights, publish
from learner.preflight.forecast import DEVICES, UTILISATION, Device, predict, this_cpu
from learner.training.alignment_trainer import AlignmentTrainer
from learner.training.distribution_matching import MatchingSettings
from learner.training.networks import ALIGNED, COLD_START, FAKE_SCORE, Networks, StageSettings
from learner.training.reward_gradients import DifferentiableRewards, InProcessRewards
from rollout_workers.sampler import SampledGroup, decode_to_uint8, sample_group
from rollout_workers.weight_receiver import VELOCITY_TOLERANCE, WeightReceiver

STEPS = 4
PROMPT = Prompt(0, "red circle")


class MeanPixel(InProcessRewards):
    """A differentiable reward that costs nothing, where a server would be asked."""

    def __init__(self) -> None:
        self.names = ("bright",)

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        assert len(prompts) == len(images_BCHW)
        return DifferentiableRewards({"bright": images_BCHW.mean(dim=(1, 2, 3))})


def main() -> None:
    arguments = _parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write, published_layers = MODELS[arguments.model]
    with tempfile.TemporaryDirectory() as folder:
        section = write(Path(folder), arguments.layers or published_layers)
        # Few CPUs compute in bfloat16; the others emulate it slowly.
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        section |= {"height": arguments.side, "width": arguments.side, "dtype": dtype}
        config = _config(section | {"gradient_checkpointing": arguments.checkpointing}, arguments)
        backbone = load_backbone(config.backbone, config.lora, device)
        if config.workers.compiled:
            backbone.compile_blocks()
        figures = _measure(backbone, config, device)
    conditions = {"device": _name(device), "side": arguments.side, "group_size": arguments.group_size}
    print(json.dumps({"benchmark": f"backbones.{arguments.model}"} | figures | conditions, indent=1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--group-size", type=int, default=24)
    parser.add_argument("--micro-batch", type=int, default=8)
    layers = "blocks of the transformer, where not as many as published; at least 2, as SD3's last one is another"
    parser.add_argument("--layers", type=int, choices=range(2, 58), metavar="N", help=layers)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compiled", action="store_true", help="of the sampler, as workers.compiled")
    return parser.parse_args()


def _config(section: dict[str, Any], arguments: argparse.Namespace) -> Config:
    alignment = {
        "prompts_per_iteration": 1,
        "group_size": arguments.group_size,
        "micro_batch": arguments.micro_batch,
        "ema_every": 1,
    }
    return Config.model_validate(
        {
            "run": {"name": "benchmark"},
            "backbone": section | {"decode_chunk": 4},
            "prompts": {"train": "none", "evaluation": "none"},
            "sampling": {"steps": STEPS},
            "alignment": alignment,
            "workers": {"compiled": arguments.compiled},
            "rewards": [{"name": "bright", "url": "http://127.0.0.1:1", "differentiable": True}],
        }
    )


def _measure(backbone: Backbone, config: Config, device: torch.device) -> dict[str, Any]:
    size = config.alignment.group_size
    networks = Networks(backbone, StageSettings.of(ColdStartConfig()), seed=0)
    networks.begin_alignment(StageSettings.of(AlignmentConfig()))
    plan = StepPlan(0, backbone.sigmas(STEPS), SamplingConfig().eta, (0, 1))
    sampled = sample_group(backbone, PROMPT, plan, seed=0, group_size=size)
    ours = _seconds(lambda: _sample_and_decode(backbone, plan, size), device)
    trainer, group = _trainer(networks, config), _scored(sampled, plan)
    # The plain pipeline and the learner are not compiled.
    with torch.compiler.set_stance("force_eager"):
        theirs = _seconds(lambda: _pipeline(backbone, size, config), device)
        totals = trainer.update([group]).totals
        _reset_peak(device)
        step = _seconds(lambda: trainer.update([group]), device)
    sizes = model_sizes(config.backbone, config.lora)
    assert sizes is not None
    peak = this_cpu(torch.get_num_threads()) if device.type == "cpu" else _device(_name(device))
    # What checkpointing computes a second time is no use.
    section = config.backbone.model_copy(update={"gradient_checkpointing": False})
    passes = predict(config.model_copy(update={"backbone": section}), sizes, peak).seconds
    ideal = (passes["fake_score"] + passes["student"]) * UTILISATION
    names = (COLD_START, ALIGNED, FAKE_SCORE)
    adapters = sum(weight.numel() for name in names for weight in backbone.adapters.parameters(name).values())
    return {
        "images_per_s": round(size / ours, 3),
        "pipeline_images_per_s": round(size / theirs, 3),
        "rollout_ratio": round(theirs / ours, 3),
        "update_s": round(step, 3),
        "utilisation": round(ideal / step, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "publish_ms": round(_seconds(lambda: _publish(backbone, config), device) * 1000, 1),
        "surrogate_gap": totals.values()["surrogate_gap"],
        "shared_over_copies": round((sizes.bases * sizes.transformer + adapters) / (3 * sizes.transformer), 3),
    }


def _sample_and_decode(backbone: Backbone, plan: StepPlan, size: int) -> None:
    sampled = sample_group(backbone, PROMPT, plan, seed=0, group_size=size)
    decode_to_uint8(backbone, sampled.latents_SGchw[-1])


def _pipeline(backbone: Backbone, size: int, config: Config) -> None:
    """The plain pipeline on the same weights, without adapters."""
    pipeline = backbone._pipeline  # type: ignore[attr-defined]
    options = config.backbone.model_dump()
    # FLUX.2 reads layers of its text encoder, and the random one has only the first few.
    text = {"text_encoder_out_layers": options["text_encoder_layers"]} if "text_encoder_layers" in options else {}
    with backbone.adapters.active("teacher"), torch.no_grad():
        pipeline(
            prompt=[PROMPT.text] * size,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            height=config.backbone.height,
            width=config.backbone.width,
            max_sequence_length=options["max_sequence_length"],
            output_type="np",
            **text,
        )


def _trainer(networks: Networks, config: Config) -> AlignmentTrainer:
    matching = MatchingSettings.of(
        config.cold_start, config.sampling, config.backbone.guidance_scale, config.alignment.consistency_weight
    )
    return AlignmentTrainer(networks, config.alignment, matching, {"bright": 1.0}, MeanPixel(), seed=0)


def _scored(sampled: SampledGroup, plan: StepPlan) -> ScoredGroup:
    latents = sampled.latents_SGchw.float().cpu()
    trajectory = TrajectoryGroup(
        PROMPT, plan, PolicyVersion(0, "unused"), latents.numpy(), sampled.surrogate_TG.float().cpu().numpy()
    )
    return ScoredGroup(trajectory, {"bright": latents[-1].mean(dim=(1, 2, 3)).numpy()})


def _publish(backbone: Backbone, config: Config) -> None:
    receiver = WeightReceiver(backbone, VELOCITY_TOLERANCE[config.backbone.dtype])
    receiver.receive(publish(backbone, 1), frozen_weights(backbone))


def _seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The fastest of some calls, after one that warms up."""
    work()
    fastest = float("inf")
    for _ in range(times):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def _device(name: str) -> Device:
    found = [device for known, device in DEVICES.items() if known in name.lower()]
    if not found:
        raise SystemExit(f"the peak of {name} is not known: add it to learner/preflight/forecast.py")
    return found[0]


if __name__ == "__main__":
    main()
