"""Blocks compiled for sampling, by torch's own compiler: the same velocities, whatever changes afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from common.types import Network
from common.weights import frozen_weights, publish
from learner.training.networks import ALIGNED, COLD_START, FAKE_SCORE, Networks, StageSettings
from rollout_workers.weight_receiver import VELOCITY_TOLERANCE, WeightReceiver
from tests.helpers.tiny_pipeline import load_tiny_backbone, randomise
from tests.helpers.tiny_training import alignment_settings, cold_start_settings

SIGMA = 0.4

pytestmark = [
    pytest.mark.slow,
    # torch's own inductor still imports a module that uses it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize("dtype", list(VELOCITY_TOLERANCE))
@torch.no_grad()
def test_a_compiled_worker_attests_samples_as_the_learner_and_follows_its_weights(
    dtype: str, tiny_pipeline: Path
) -> None:
    torch._dynamo.reset()
    counters.clear()
    trained, worker = (load_tiny_backbone(tiny_pipeline, dtype=dtype) for _ in range(2))
    Networks(trained, StageSettings.of(cold_start_settings()), 0).begin_alignment(
        StageSettings.of(alignment_settings())
    )
    for seed, name in enumerate((COLD_START, ALIGNED, FAKE_SCORE)):
        randomise(trained, name, seed)
    worker.compile_blocks()
    receiver = WeightReceiver(worker, VELOCITY_TOLERANCE[dtype])
    latents_Bchw = torch.randn(3, *worker.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning, sigma_B = trained.encode_prompts(["red", "blue", "a dot"]), torch.full((3,), SIGMA)
    for version in (1, 2):
        assert receiver.receive(publish(trained, version), frozen_weights(trained)).number == version
        for network in (Network.STUDENT, Network.TEACHER):
            compiled, plain = (
                backbone.velocity(network, latents_Bchw, sigma_B, conditioning) for backbone in (worker, trained)
            )
            torch.testing.assert_close(compiled, plain, atol=VELOCITY_TOLERANCE[dtype], rtol=0)
        randomise(trained, ALIGNED, seed=9)
    # Two kinds of block, for the student's shapes and the teacher's; nothing fell back.
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]
