"""The directory of a run that has come to its end, made without running one: random adapters on the tiny pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from common.backbones.sd3 import StableDiffusion3
from common.config.run import Config, LoraConfig
from common.config.stages import AlignmentConfig, ColdStartConfig
from common.types import Network, Position, Stage
from learner.checkpoint import CheckpointStore
from learner.preflight.run_file import dump_config
from learner.training.lora_file import write_lora
from learner.training.networks import ALIGNED, COLD_START, Networks, StageSettings
from tests.helpers.tiny_pipeline import TARGETS, load_tiny_backbone, randomise

PROMPTS = ("red circle", "two dots")


def tiny_config(pipeline: Path, prompts: Path) -> Config:
    """A run file of the tiny pipeline whose one reward nobody serves."""
    return Config.model_validate(
        {
            "run": {"name": "tiny", "seed": 3},
            "backbone": {
                "path": str(pipeline),
                "max_sequence_length": 10,
                "dtype": "float32",
                "guidance_scale": 3.0,
            },
            "lora": {"rank": 2, "alpha": 4, "targets": TARGETS},
            "prompts": {"train": str(prompts), "evaluation": str(prompts)},
            "evaluation": {"teacher_steps": 6, "teacher_guidance": 3.0},
            "rewards": [
                {"name": "bright", "scorer": "tests.helpers.toy_scorers:BrightnessScorer", "differentiable": True}
            ],
        }
    )


def write_trained_run(directory: Path, pipeline: Path) -> StableDiffusion3:
    """Write config.yaml, a checkpoint of each stage and lora/; returns a backbone whose student is the final one."""
    backbone = load_tiny_backbone(pipeline, LoraConfig(rank=2, alpha=4, targets=TARGETS))
    networks = Networks(backbone, StageSettings.of(ColdStartConfig()), seed=0)
    root, base = directory / "checkpoints", backbone.base_fingerprint()
    randomise(backbone, COLD_START, seed=1, scale=0.3)
    _settle(networks)
    CheckpointStore(root).save(Position(Stage.COLD_START, 10), networks.state(), {}, base)
    networks.begin_alignment(StageSettings.of(AlignmentConfig()))
    randomise(backbone, ALIGNED, seed=2, scale=0.3)
    _settle(networks)
    # What trains differs from its average, so that a test can tell which of them was taken.
    randomise(backbone, ALIGNED, seed=9, scale=0.3)
    CheckpointStore(root).save(Position(Stage.ALIGNMENT, 10), networks.state(), {}, base)
    prompts = directory / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    (directory / "config.yaml").write_text(dump_config(tiny_config(pipeline, prompts)))
    backbone.adapters.load(ALIGNED, networks.average.state())
    write_lora(backbone, directory / "lora")
    return backbone


def velocity(backbone: StableDiffusion3, network: Network = Network.STUDENT) -> torch.Tensor:
    """A network's velocity for fixed latents: [2, c, h, w]."""
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.velocity(network, latents, torch.tensor([0.9, 0.5]), backbone.encode_prompts(list(PROMPTS)))


def _settle(networks: Networks) -> None:
    """Make the moving average what the student is now."""
    networks.average.load(networks.backbone.adapters.state(networks.student_adapter))
