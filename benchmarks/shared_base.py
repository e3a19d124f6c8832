"""Memory of the three networks on one frozen base, and as three models. Prints one JSON object.

    python -m benchmarks.shared_base [--layers 8]

Random weights of SD3.5-M's width, cut to so many blocks, in bfloat16. Each way is a process of its own, which once
loaded runs a pass of every network, and the backward pass of the two that train; the figure is its peak then (VmHWM,
Linux), one set of text encoders, one VAE and Python included.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.random_pipelines import write_sd35_medium
from common.backbones import load_backbone
from common.backbones.base import Backbone
from common.config.backbones import Sd3Backbone
from common.config.run import LoraConfig
from common.config.stages import ColdStartConfig
from common.types import Network
from learner.training.networks import Networks, StageSettings

SIDE = 128
WAYS = ("shared", "copies")
NETWORKS = (Network.TEACHER, Network.STUDENT, Network.FAKE_SCORE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--pipeline", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        _measure(arguments.pipeline, arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_sd35_medium(Path(folder), arguments.layers)
        command = [sys.executable, "-m", "benchmarks.shared_base", "--pipeline", folder, "--measure"]
        gib = {way: float(subprocess.check_output([*command, way])) for way in WAYS}
    result = {"benchmark": "shared_base", "layers": arguments.layers} | {f"{way}_gib": gib[way] for way in WAYS}
    print(json.dumps(result | {"shared_over_copies": round(gib["shared"] / gib["copies"], 3)}, indent=1))


def _measure(pipeline: Path, way: str) -> None:
    settings = Sd3Backbone(path=pipeline, height=SIDE, width=SIDE, max_sequence_length=77)
    held = [_loaded(settings) for _ in range(1 if way == "shared" else len(NETWORKS))]
    for copy in held[1:]:
        # What three models would share as well.
        copy._pipeline, copy._vae = held[0]._pipeline, held[0]._vae  # type: ignore[attr-defined]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for network, backbone in zip(NETWORKS, held * len(NETWORKS), strict=False):
        latents = torch.randn(1, *backbone.latent_shape)
        conditioning = backbone.encode_prompts(["red circle"])
        with torch.set_grad_enabled(network != Network.TEACHER):
            velocity = backbone.velocity(network, latents, torch.full((1,), 0.5), conditioning)
        if velocity.requires_grad:
            velocity.square().mean().backward()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(round(int(peak[1]) / 2**20, 2))


def _loaded(settings: Sd3Backbone) -> Backbone:
    backbone = load_backbone(settings, LoraConfig(), torch.device("cpu"))
    Networks(backbone, StageSettings.of(ColdStartConfig()), seed=0)
    return backbone


if __name__ == "__main__":
    main()
