"""Ray is for the service alone: families, sampler, trainers, and what uses a trained run, do without."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.running_service import PROJECT_ROOT

WITHOUT_RAY = (
    "common.backbones.sd3",
    "common.backbones.flux1",
    "common.backbones.flux2",
    "rollout_workers.sampler",
    "rollout_workers.weight_receiver",
    "learner.training.alignment_trainer",
    "learner.training.cold_start_trainer",
    "learner.training.networks",
    "learner.training.distribution_matching",
    "learner.tools.generate",
    "learner.tools.export",
    "learner.tools.evaluate",
)


def test_no_ray_is_needed() -> None:
    # None makes every import of it fail.
    code = f"import sys; sys.modules['ray'] = None; import {', '.join(WITHOUT_RAY)}; print('ok')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.stdout == "ok\n", result.stderr
