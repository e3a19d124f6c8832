"""Blocks compiled for sampling, by torch's own compiler: the same velocities, whatever changes afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.backbones.base import Network
from common.weights import publish
from learner.networks import ALIGNED, COLD_START, FAKE_SCORE, Networks, OptimizerSettings
from rollout_workers.weight_receiver import WeightReceiver
from tests.tiny_pipeline import load_tiny_backbone, randomise
from tests.tiny_training import alignment_settings, new_networks

SIGMA = 0.4

pytestmark = pytest.mark.slow


def learner(pipeline: Path) -> Networks:
    networks = new_networks(pipeline)
    networks.begin_alignment(OptimizerSettings.of(alignment_settings()))
    for seed, name in enumerate((COLD_START, ALIGNED, FAKE_SCORE)):
        randomise(networks.backbone, name, seed)
    return networks


@torch.no_grad()
def test_a_compiled_worker_attests_samples_as_the_learner_and_follows_its_weights(tiny_pipeline: Path) -> None:
    trained = learner(tiny_pipeline).backbone
    worker = load_tiny_backbone(tiny_pipeline)
    worker.compile_blocks()
    receiver = WeightReceiver(worker)
    latents_Bchw = torch.randn(3, *worker.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning, sigma_B = trained.encode_prompts(["red", "blue", "a dot"]), torch.full((3,), SIGMA)
    for version in (1, 2):
        assert receiver.receive(publish(trained, version)).number == version
        for network in (Network.STUDENT, Network.TEACHER):
            compiled, plain = (
                backbone.velocity(network, latents_Bchw, sigma_B, conditioning) for backbone in (worker, trained)
            )
            torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=0)
        randomise(trained, ALIGNED, seed=9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
