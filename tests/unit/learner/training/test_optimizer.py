"""The optimizer of an adapter: its learning rate over a stage, clipping, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from common.errors import TrainingError
from learner.training.optimizer import AdapterOptimizer, LearningRate, OptimizerSettings


def optimizer_of(weight: Parameter, rate: LearningRate, weight_decay: float = 0.0) -> AdapterOptimizer:
    return AdapterOptimizer("student", {"weight": weight}, OptimizerSettings(rate, weight_decay, gradient_clip=1.0))


def test_a_constant_learning_rate_stays() -> None:
    rate = LearningRate(0.5, "constant", iterations=4)
    assert [rate.at(iteration) for iteration in range(5)] == [0.5] * 5


def test_a_linear_learning_rate_falls_to_zero() -> None:
    rate = LearningRate(0.5, "linear", iterations=4)
    assert [rate.at(iteration) for iteration in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]


@pytest.mark.parametrize(("iteration", "moved"), [(0, 0.5), (2, 0.25), (4, 0.0)])
def test_a_step_uses_the_rate_of_its_iteration(iteration: int, moved: float) -> None:
    """AdamW's first step moves a weight by the learning rate, whatever the size of its gradient."""
    weight = Parameter(torch.tensor([1.0]))
    optimizer = optimizer_of(weight, LearningRate(0.5, "linear", iterations=4))
    weight.grad = torch.tensor([0.01])
    assert optimizer.step(iteration) == pytest.approx(0.01)
    assert weight.item() == pytest.approx(1 - moved, abs=1e-6)


def test_a_long_gradient_is_clipped_and_its_norm_before_is_returned() -> None:
    """AdamW's first moment is a tenth of the gradient it was given: (3, 4) of norm 5, clipped to norm 1."""
    weight = Parameter(torch.zeros(2))
    optimizer = optimizer_of(weight, LearningRate(0.5, "constant", iterations=4))
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizer.step(0) == pytest.approx(5.0)
    assert optimizer.state()["weight|exp_avg"].tolist() == pytest.approx([0.06, 0.08], rel=1e-4)


def test_weight_decay_takes_its_share_of_the_weight() -> None:
    weight = Parameter(torch.tensor([2.0]))
    optimizer = optimizer_of(weight, LearningRate(0.5, "constant", iterations=4), weight_decay=0.1)
    weight.grad = torch.zeros(1)
    optimizer.step(0)
    assert weight.item() == pytest.approx(2 * (1 - 0.5 * 0.1))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    weight = Parameter(torch.tensor([1.0]))
    optimizer = optimizer_of(weight, LearningRate(0.5, "constant", iterations=4))
    weight.grad = torch.tensor([float("nan")])
    with pytest.raises(TrainingError, match="gradient of the student has norm nan in iteration 3"):
        optimizer.step(3)
    assert weight.item() == 1.0
