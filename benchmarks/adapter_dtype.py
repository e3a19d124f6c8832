"""Movement of float32 and bfloat16 adapters under the published rate of stage 2, on the shapes world.

    python -m benchmarks.adapter_dtype [--iterations 1000] [--seeds 0 1 2] [--out FILE]

The authors of RTDMD train bfloat16 adapters at a rate of 3e-6. AdamW moves a weight by about the rate per step, and a
bfloat16 number near 1e-3 has neighbours 7.6e-6 away: half of that is more than a step, so B stops there. Ours are
float32. Both are trained here by the same cold-start updates (the gradients of student and fake score are real), with
A ~ N(0, 1) as in stage 2. Prints JSON: per adapter the root mean square and the largest |B|, and their ratio.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.as_json import add_out, show
from common.backbones import load_backbone
from common.backbones.flat_adapter import FlatAdapter
from common.command import user_path
from common.config.run import Config
from common.config.stages import ColdStartConfig
from common.prompts import load_prompts
from learner.preflight.command_line import parse
from learner.training.cold_start_trainer import ColdStartTrainer
from learner.training.networks import COLD_START, FAKE_SCORE, Networks, StageSettings
from learner.training.optimizer import AdapterOptimizer, MovingAverage

RATE = 3e-6
SETTINGS = {
    "batch_size": 4,
    "student_every": 1,
    "learning_rate_student": RATE,
    "learning_rate_fake": RATE,
    "lora_init_std": 1.0,
    "consistency_weight": 0.0,
}


def trained_b(config: Config, dtype: torch.dtype, iterations: int, seed: int) -> dict[str, Tensor]:
    """All B of student and fake score after so many updates, one flat tensor per network."""
    settings = ColdStartConfig.model_validate(SETTINGS | {"iterations": iterations})
    backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    networks = Networks(backbone, StageSettings.of(settings), seed)
    bank, stage = backbone.adapters, StageSettings.of(settings)
    # New optimizers, which have the moments in that type.
    networks.student_optimizer = AdapterOptimizer("student", _in_dtype(bank.adapter(COLD_START), dtype), stage.student)
    networks.fake_optimizer = AdapterOptimizer("fake score", _in_dtype(bank.adapter(FAKE_SCORE), dtype), stage.fake)
    networks.average = MovingAverage(bank.adapter(COLD_START), stage.ema_decay)
    trainer = ColdStartTrainer(
        networks, settings, config.sampling, config.backbone.guidance_scale, load_prompts(config.prompts.train), seed
    )
    for iteration in range(iterations):
        trainer.update(iteration)
    return {
        network: torch.cat([value.flatten() for key, value in bank.state(name).items() if ".lora_B." in key])
        for network, name in (("student", COLD_START), ("fake score", FAKE_SCORE))
    }


def _in_dtype(adapter: FlatAdapter, dtype: torch.dtype) -> FlatAdapter:
    """The adapter, with its weights in this type."""
    adapter.flat_n = adapter.flat_n.to(dtype)
    for parameter, part in zip(adapter.parameters.values(), adapter.split(adapter.flat_n).values(), strict=True):
        parameter.data = part
    return adapter


def compared(config: Config, iterations: int, seed: int) -> dict[str, dict[str, float]]:
    """Per network: |B| in either type, and the ratio of the root mean squares."""
    wide = trained_b(config, torch.float32, iterations, seed)
    narrow = trained_b(config, torch.bfloat16, iterations, seed)
    return {
        network: {
            "float32_rms": _rms(wide[network]),
            "float32_max": wide[network].abs().max().item(),
            "bfloat16_rms": _rms(narrow[network]),
            "bfloat16_max": narrow[network].abs().max().item(),
            "ratio_of_rms": _rms(wide[network]) / _rms(narrow[network]),
            "ratio_of_max": (wide[network].abs().max() / narrow[network].abs().max()).item(),
        }
        for network in wide
    }


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_dtype", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=user_path, default=Path("deploy/runs/shapes.yaml"), metavar="FILE")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_out(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = parse(["--config", str(arguments.config)], {}).config
    found = {
        "benchmark": "adapter_dtype",
        "iterations": arguments.iterations,
        "rate": RATE,
        "seeds": {seed: compared(config, arguments.iterations, seed) for seed in arguments.seeds},
    }
    show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
