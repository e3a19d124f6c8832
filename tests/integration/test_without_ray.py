"""Ray is for the service alone: families, sampler, trainers, and what uses a trained run, do without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.running_service import PROJECT_ROOT

ROOMS = {
    "models and updates": (
        "common.backbones.sd3",
        "common.backbones.flux1",
        "common.backbones.flux2",
        "rollout_workers.sampler",
        "rollout_workers.weight_receiver",
        "learner.training.alignment_trainer",
        "learner.training.cold_start_trainer",
        "learner.training.networks",
        "learner.training.distribution_matching",
    ),
    "using a run": ("learner.tools.generate", "learner.tools.export", "learner.tools.evaluate"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_no_ray_is_needed(room: str) -> None:
    # None makes every import of it fail.
    code = f"import sys; sys.modules['ray'] = None; import {', '.join(ROOMS[room])}; print('ok')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.stdout == "ok\n", result.stderr
