"""The published models at full size, with random weights, on a GPU. Speed is `benchmarks/backbones.py`'s to tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.random_pipelines import MODELS
from tests.helpers.running_service import PROJECT_ROOT

DEADLINE = 1200.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", list(MODELS))
def test_a_whole_update_fits_and_sampler_and_learner_agree(model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.backbones", model],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["surrogate_gap"] <= 1e-3
    assert figures["peak_gib"] < torch.cuda.get_device_properties(0).total_memory / 2**30
    assert figures["shared_over_copies"] < {"sd35_medium": 0.4, "flux2_klein_4b": 0.75}[model]
