"""The LoRA layer: its arithmetic, its gradients, and what it computes when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.backbones.lora_linear import ActiveNetwork, LoraLinear

SCALE = 0.5
RANKS = {"one": 2, "two": 3}
INPUTS, OUTPUTS = 4, 5


def made(
    dtype: torch.dtype, stack: tuple[str, ...], trainable: tuple[str, ...] = ()
) -> tuple[LoraLinear, ActiveNetwork]:
    """A layer with random weights and two adapters, of which the network "net" uses `stack`."""
    generator, active = torch.Generator().manual_seed(0), ActiveNetwork()
    layer = LoraLinear(nn.Linear(INPUTS, OUTPUTS, dtype=dtype).requires_grad_(False), active)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    for name, rank in RANKS.items():
        shapes = ((rank, INPUTS), (OUTPUTS, rank))
        layer.add(name, *(nn.Parameter(torch.zeros(shape, dtype=precise), name in trainable) for shape in shapes))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.define("net", stack, SCALE)
    layer.refresh("net")
    active.name = "net"
    return layer, active


def merged(layer: LoraLinear, stack: tuple[str, ...]) -> Tensor:
    return layer.base.weight + sum(SCALE * layer.lora_B[name] @ layer.lora_A[name] for name in stack)


@pytest.mark.parametrize("stack", [(), ("one",), ("one", "two"), ("two", "one")])
def test_a_stack_equals_the_merged_weights(stack: tuple[str, ...]) -> None:
    layer, active = made(torch.float32, stack)
    inputs = torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(inputs, merged(layer, stack), layer.bias)
    assert layer(inputs).shape == (2, 3, OUTPUTS)
    assert (layer(inputs) - expected).abs().max() <= 1e-6
    # A matrix product of fewer rows may round differently.
    assert (layer(inputs[0]) - layer(inputs)[0]).abs().max() <= 1e-6
    active.name = "another"
    assert torch.equal(layer(inputs), layer.base(inputs))


def test_the_gradients_are_those_by_hand() -> None:
    """With g = dL/dy: dL/dx = g W', dL/dA = s (g B)^T x and dL/dB = s g^T (x A^T), summed over the rows."""
    layer, _ = made(torch.float64, ("one", "two"), trainable=("one", "two"))
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, OUTPUTS, dtype=torch.float64)
    layer(x).backward(g)
    rows, g_rows = x.detach().flatten(0, 1), g.flatten(0, 1)
    assert x.grad is not None
    assert (x.grad - g @ merged(layer, ("one", "two"))).abs().max() <= 1e-12
    for name in RANKS:
        a, b = layer.lora_A[name], layer.lora_B[name]
        assert (a.grad - SCALE * (g_rows @ b).T @ rows).abs().max() <= 1e-12
        assert (b.grad - SCALE * g_rows.T @ (rows @ a.T)).abs().max() <= 1e-12
    assert layer.weight.grad is None


def test_the_gradients_are_those_of_finite_differences() -> None:
    layer, _ = made(torch.float64, ("two", "one"), trainable=("one", "two"))
    x, g = (torch.randn(3, width, dtype=torch.float64) for width in (INPUTS, OUTPUTS))
    x.requires_grad_(True)

    def loss() -> Tensor:
        layer.refresh("net")
        return (layer(x).sin() * g).sum()

    def changed(entry: Tensor, step: float) -> Tensor:
        entry.add_(step)
        return loss()

    variables = [x, *layer.lora_A.values(), *layer.lora_B.values()]
    found = torch.autograd.grad(loss(), variables)
    with torch.no_grad():
        for variable, gradient in zip(variables, found, strict=True):
            for entry, slope in zip(variable.view(-1), gradient.flatten(), strict=True):
                higher, lower = (changed(entry, step) for step in (1e-6, -2e-6))
                entry.add_(1e-6)
                assert abs((higher - lower) / 2e-6 - slope) <= 1e-8


def test_a_frozen_adapter_takes_part_and_gets_no_gradient() -> None:
    layer, _ = made(torch.float64, ("one", "two"), trainable=("two",))
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.lora_A["one"].grad is None
    expected = SCALE * torch.ones(OUTPUTS, 3, dtype=torch.float64) @ (x @ layer.lora_A["two"].T)
    assert (layer.lora_B["two"].grad - expected).abs().max() <= 1e-12


def test_a_change_counts_from_the_next_refresh() -> None:
    layer, _ = made(torch.float32, ("one",))
    inputs = torch.randn(3, INPUTS)
    before = layer(inputs)
    with torch.no_grad():
        layer.lora_B["one"].zero_()
    assert torch.equal(layer(inputs), before)
    layer.refresh("net")
    assert torch.allclose(layer(inputs), layer.base(inputs))


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    layer, _ = made(torch.float32, ("one",), trainable=("one",))
    output = layer(torch.randn(3, INPUTS))
    layer.refresh("net")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_base_computes_in_bfloat16_and_adapters_get_float32_gradients(autocast: bool) -> None:
    layer, _ = made(torch.bfloat16, ("one", "two"), trainable=("two",))
    inputs = torch.randn(3, INPUTS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(inputs if autocast else inputs.bfloat16())
    assert found.dtype == torch.bfloat16
    expected = inputs.bfloat16().float() @ merged(layer, ("one", "two")).T.float() + layer.base.bias.float()
    assert (found.float() - expected).norm() <= 0.02 * expected.norm()
    found.float().square().mean().backward()
    assert {layer.lora_A["two"].dtype, layer.lora_A["two"].grad.dtype} == {torch.float32}


def test_copies_are_no_part_of_a_state_dict_and_move_with_the_layer() -> None:
    layer, _ = made(torch.float32, ("one", "two"))
    assert layer.state_dict().keys() == {
        *("base.weight", "base.bias"),
        *(f"lora_{part}.{name}" for part in "AB" for name in RANKS),
    }
    assert {buffer.device.type for buffer in layer.to("meta").buffers()} == {"meta"}


def test_compiled_code_computes_the_same_and_follows_the_network() -> None:
    layer, active = made(torch.float32, ("one", "two"))
    layer.define("other", ("two",), SCALE)
    layer.refresh("other")
    inputs = torch.randn(3, INPUTS)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in ("net", "other", "bare", "net"):
            active.name = name
            assert torch.equal(compiled(inputs), layer(inputs))
        layer.lora_B["one"].zero_()
        layer.refresh("net")
        assert torch.equal(compiled(inputs), layer(inputs))
