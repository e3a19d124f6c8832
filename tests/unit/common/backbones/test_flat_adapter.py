"""An adapter in one tensor: its parts, its count of changes, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from common.backbones.flat_adapter import FlatAdapter
from common.errors import ModelError, WeightUpdateError

SHAPES = {"b": (2, 1), "a": (1, 3)}
STATE = {"a": torch.tensor([[3.0, 4.0, 5.0]]), "b": torch.tensor([[1.0], [2.0]])}


def made(*, trainable: bool = True) -> FlatAdapter:
    adapter = FlatAdapter("own", SHAPES, trainable=trainable)
    adapter.load(STATE)
    return adapter


def test_the_parts_lie_in_the_order_of_the_names_and_are_views() -> None:
    adapter = made()
    assert adapter.flat_n.tolist() == [1, 2, 3, 4, 5]
    assert list(adapter.parameters) == ["b", "a"]
    with torch.no_grad():
        adapter.parameters["a"][0, 1] = 7
    assert adapter.flat_n.tolist() == [1, 2, 3, 7, 5]
    assert adapter.split(torch.arange(5.0))["a"].tolist() == [[2, 3, 4]]
    assert adapter.joined(STATE).tolist() == [1, 2, 3, 4, 5]


def test_every_change_in_place_counts_once() -> None:
    adapter = made()
    versions = [adapter.version]
    adapter.load(STATE)
    versions.append(adapter.version)
    with torch.no_grad():
        adapter.parameters["b"].add_(1)
    versions.append(adapter.version)
    adapter.flat_n.mul_(2)
    versions.append(adapter.version)
    assert [after - before for before, after in itertools.pairwise(versions)] == [1, 1, 1]


def test_a_state_is_a_copy_that_a_file_takes() -> None:
    adapter = made()
    state = adapter.state()
    adapter.flat_n.zero_()
    saved = load(save(state))
    assert saved.keys() == STATE.keys()
    assert all(torch.equal(saved[key], value) for key, value in STATE.items())


def test_weights_of_another_type_are_taken() -> None:
    adapter = made()
    adapter.load({key: 2 * value.bfloat16() for key, value in STATE.items()})
    assert adapter.flat_n.tolist() == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": STATE["a"]}, r"do not fit adapter 'own': 1 missing \['b'\], 0 unknown"),
        (STATE | {"c": STATE["a"]}, r"0 missing \[\], 1 unknown \['c'\]"),
        (STATE | {"a": STATE["a"].T}, r"a is \[3, 1\], expected \[1, 3\]"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(state: dict[str, Tensor], message: str) -> None:
    adapter = made()
    with pytest.raises(WeightUpdateError, match=message):
        adapter.load({key: value + 1 for key, value in state.items()})
    assert adapter.flat_n.tolist() == [1, 2, 3, 4, 5]


def test_backward_passes_add_to_one_gradient_and_count_what_they_reach() -> None:
    adapter = made()
    assert adapter.reached() == [False, False]
    adapter.clear_gradient()
    for _ in range(2):
        (adapter.parameters["a"] * 2).sum().backward()
    assert adapter.gradient_n.tolist() == [0, 0, 4, 4, 4]
    assert adapter.reached() == [False, True]
    adapter.gradient_n.mul_(2)
    assert adapter.parameters["a"].grad is not None
    assert adapter.parameters["a"].grad.tolist() == [[8, 8, 8]]
    assert adapter.reached() == [False, True]
    adapter.clear_gradient()
    assert (adapter.gradient_n.any().item(), adapter.reached()) == (False, [False, False])


def test_a_gradient_of_zeros_has_reached_its_parameter() -> None:
    adapter = made()
    adapter.clear_gradient()
    (adapter.parameters["a"] * 0).sum().backward()
    assert adapter.reached() == [False, True]
    adapter.mark_reached([True, False])
    assert adapter.reached() == [True, True]


def test_a_frozen_adapter_has_no_gradient() -> None:
    adapter = made()
    adapter.clear_gradient()
    adapter.freeze()
    assert all(parameter.grad is None for parameter in adapter.parameters.values())
    assert not any(parameter.requires_grad for parameter in adapter.parameters.values())
    assert adapter.reached() == [False, False]


def test_other_gradients_of_autograd_leave_no_trace() -> None:
    adapter = made()
    adapter.clear_gradient()
    parameter = adapter.parameters["a"]
    (found,) = torch.autograd.grad((parameter * 3).sum(), parameter)
    assert found.tolist() == [[3, 3, 3]]
    assert (adapter.gradient_n.any().item(), adapter.reached()) == (False, [False, False])


def test_parameters_that_were_moved_away_are_named() -> None:
    adapter = made()
    module = nn.ParameterDict(adapter.parameters)
    assert module.to("cpu")["a"].data_ptr() == adapter.parameters["a"].data_ptr()
    module.double()
    with pytest.raises(ModelError, match="adapter 'own': b was moved or copied away from the adapter's memory"):
        _ = adapter.version


def test_one_parameter_that_was_moved_away_is_named_before_it_is_trained() -> None:
    adapter = made()
    adapter.parameters["a"].data = adapter.parameters["a"].data.clone()
    with pytest.raises(ModelError, match="adapter 'own': a was moved or copied away"):
        adapter.clear_gradient()


def test_a_gradient_that_was_replaced_is_named() -> None:
    """`zero_grad` of a module takes it away, and the next backward pass makes another."""
    adapter = made()
    adapter.clear_gradient()
    nn.ParameterDict(adapter.parameters).zero_grad(set_to_none=True)
    adapter.parameters["a"].sum().backward()
    with pytest.raises(ModelError, match="adapter 'own': the gradient of a was replaced: change `grad` in place"):
        adapter.reached()


def test_weights_that_require_a_gradient_leave_the_adapter_without_a_graph() -> None:
    adapter = made()
    adapter.load({key: value.clone().requires_grad_() for key, value in STATE.items()})
    assert not adapter.flat_n.requires_grad
    assert adapter.flat_n.tolist() == [1, 2, 3, 4, 5]


def test_an_adapter_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="adapter 'own' has no weights: name layers for it"):
        FlatAdapter("own", {}, trainable=True)
