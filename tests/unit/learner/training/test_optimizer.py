"""The optimizer of an adapter: its learning rate over a stage, clipping, its state, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from common.backbones.flat_adapter import FlatAdapter
from common.errors import TrainingError
from learner.training.optimizer import BETAS, EPSILON, AdapterOptimizer, LearningRate, OptimizerSettings

CONSTANT = LearningRate(0.5, "constant", iterations=4)


def adapter_of(**weights: list[float]) -> FlatAdapter:
    adapter = FlatAdapter("own", {name: (len(values),) for name, values in weights.items()}, trainable=True)
    adapter.load({name: torch.tensor(values) for name, values in weights.items()})
    return adapter


def optimizer_of(
    adapter: FlatAdapter, rate: LearningRate = CONSTANT, weight_decay: float = 0.0, clip: float = 1.0
) -> AdapterOptimizer:
    return AdapterOptimizer("student", adapter, OptimizerSettings(rate, weight_decay, clip))


def step(optimizer: AdapterOptimizer, adapter: FlatAdapter, iteration: int, **gradients: list[float]) -> float:
    """A step with these gradients."""
    with optimizer.gathering():
        for name, values in gradients.items():
            (adapter.parameters[name] * torch.tensor(values)).sum().backward()
    return optimizer.step(iteration)


def test_a_constant_learning_rate_stays() -> None:
    rate = LearningRate(0.5, "constant", iterations=4)
    assert [rate.at(iteration) for iteration in range(5)] == [0.5] * 5


def test_a_linear_learning_rate_falls_to_zero() -> None:
    rate = LearningRate(0.5, "linear", iterations=4)
    assert [rate.at(iteration) for iteration in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]


@pytest.mark.parametrize(("iteration", "moved"), [(0, 0.5), (2, 0.25), (4, 0.0)])
def test_a_step_uses_the_rate_of_its_iteration(iteration: int, moved: float) -> None:
    """AdamW's first step moves a weight by the learning rate, whatever the size of its gradient."""
    adapter = adapter_of(x=[1.0])
    optimizer = optimizer_of(adapter, LearningRate(0.5, "linear", iterations=4))
    assert step(optimizer, adapter, iteration, x=[0.01]) == pytest.approx(0.01)
    assert adapter.flat_n.item() == pytest.approx(1 - moved, abs=1e-6)


def test_a_long_gradient_is_clipped_and_its_norm_before_is_returned() -> None:
    """AdamW's first moment is a tenth of the gradient it was given: (3, 4) of norm 5, clipped to norm 1."""
    adapter = adapter_of(x=[0.0], y=[0.0])
    optimizer = optimizer_of(adapter)
    assert step(optimizer, adapter, 0, x=[3.0], y=[4.0]) == pytest.approx(5.0)
    moments = [optimizer.state()[f"{name}|exp_avg"].item() for name in "xy"]
    assert moments == pytest.approx([0.06, 0.08], rel=1e-4)


def test_weight_decay_takes_its_share_of_the_weight() -> None:
    adapter = adapter_of(x=[2.0])
    step(optimizer_of(adapter, weight_decay=0.1), adapter, 0, x=[0.0])
    assert adapter.flat_n.item() == pytest.approx(2 * (1 - 0.5 * 0.1))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    adapter = adapter_of(x=[1.0], y=[2.0])
    optimizer = optimizer_of(adapter, weight_decay=0.1)
    with pytest.raises(TrainingError, match="gradient of the student has norm nan in iteration 3"):
        step(optimizer, adapter, 3, x=[float("nan")], y=[1.0])
    assert adapter.flat_n.tolist() == [1, 2]
    assert optimizer.state() == {}


def test_without_a_gradient_nothing_changes() -> None:
    adapter = adapter_of(x=[1.0])
    optimizer = optimizer_of(adapter, weight_decay=0.1)
    assert step(optimizer, adapter, 0) == 0
    assert (adapter.flat_n.item(), optimizer.state()) == (1, {})


WEIGHTS = {"x": [1.0, -2.0], "unused": [5.0], "y": [0.5, 3.0, -1.0]}


def gradients(iteration: int) -> dict[str, list[float]]:
    drawn = torch.randn(5, generator=torch.Generator().manual_seed(iteration)).tolist()
    return {"x": drawn[:2], "y": drawn[2:]}


def per_parameter(steps: int) -> tuple[dict[str, Parameter], torch.optim.AdamW]:
    """torch's AdamW over the same parameters, one by one, after some steps."""
    parameters = {name: Parameter(torch.tensor(values)) for name, values in WEIGHTS.items()}
    adamw = torch.optim.AdamW(parameters.values(), lr=0.5, betas=BETAS, eps=EPSILON, weight_decay=0.1)
    for iteration in range(steps):
        for name, values in gradients(iteration).items():
            parameters[name].grad = torch.tensor(values)
        adamw.step()
    return parameters, adamw


def test_steps_are_those_of_torchs_adamw_and_leave_a_parameter_without_gradient_alone() -> None:
    adapter = adapter_of(**WEIGHTS)
    optimizer = optimizer_of(adapter, weight_decay=0.1, clip=1e9)
    for iteration in range(4):
        step(optimizer, adapter, iteration, **gradients(iteration))
    expected, _ = per_parameter(4)
    for name, parameter in expected.items():
        torch.testing.assert_close(adapter.parameters[name], parameter, rtol=1e-6, atol=1e-6)
    assert adapter.parameters["unused"].item() == 5


def test_a_state_per_parameter_of_an_earlier_version_is_continued() -> None:
    """It has no entries for a parameter that never had a gradient."""
    before, adamw = per_parameter(3)
    saved: dict[str, Tensor] = {
        f"{name}|{kind}": value for name, p in before.items() for kind, value in adamw.state[p].items()
    }
    assert not any(key.startswith("unused") for key in saved)
    adapter = adapter_of(**WEIGHTS)
    adapter.load({name: parameter.detach() for name, parameter in before.items()})
    optimizer = optimizer_of(adapter, weight_decay=0.1, clip=1e9)
    optimizer.load(saved)
    step(optimizer, adapter, 3, **gradients(3))
    expected, adamw = per_parameter(4)
    state = optimizer.state()
    for name, parameter in expected.items():
        torch.testing.assert_close(adapter.parameters[name], parameter, rtol=1e-6, atol=1e-6)
        for kind, value in adamw.state[parameter].items():
            torch.testing.assert_close(state[f"{name}|{kind}"], value, rtol=1e-6, atol=1e-6)
    assert state["unused|exp_avg_sq"].item() == 0


def test_a_state_of_no_step_takes_the_moments_away() -> None:
    adapter = adapter_of(x=[1.0])
    optimizer = optimizer_of(adapter)
    step(optimizer, adapter, 0, x=[1.0])
    assert optimizer.state().keys() == {"x|step", "x|exp_avg", "x|exp_avg_sq"}
    optimizer.load({})
    assert optimizer.state() == {}
