"""The signal-to-noise ratio of a gradient along a reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.claims.variance import ARMS, Arm, measured


class Known:
    """Gradients of components 1, 2 and 3 along the first axis, and 4 across it."""

    def gradient(self, arm: Arm, seed: int, iteration: int) -> Tensor:
        assert (arm, seed) == (ARMS["grpo"], 5)
        return torch.tensor([float(iteration), 4.0])


def test_signal_to_noise_is_mean_over_deviation_along_the_reference() -> None:
    found = measured(Known(), torch.tensor([10.0, 0.0]), ARMS["grpo"], iter((1, 2, 3)), seed=5)
    assert (found["batches"], found["mean"], found["spread"]) == (3, 2.0, 1.0)
    assert found["mean_error"] == pytest.approx(3**-0.5)
    assert found["signal_to_noise"] == 2.0
    assert found["norm"] == pytest.approx((17**0.5 + 20**0.5 + 5) / 3)
