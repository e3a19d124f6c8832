"""Options that save memory change a backbone's results little or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.backbones.device.int8 import Int8Linear, quantise_linears
from common.backbones.sd3 import StableDiffusion3
from common.config.backbones import Sd3Backbone
from common.types import Network
from tests.helpers.tiny_pipeline import UNUSED_MODULE, randomise, tiny_lora

SIGMA = torch.tensor([0.9, 0.4])
PROMPTS = ["red", "blue"]


def backbone(pipeline: Path, **settings: object) -> StableDiffusion3:
    section = {"path": pipeline, "max_sequence_length": 4, "dtype": "float32"} | settings
    made = StableDiffusion3(Sd3Backbone.model_validate(section), tiny_lora(), torch.device("cpu"))
    made.adapters.add("student", seed=0, trainable=True)
    made.adapters.define(Network.STUDENT, ("student",))
    randomise(made, "student", seed=1)
    return made


def latents(of: StableDiffusion3) -> Tensor:
    return torch.randn(2, *of.latent_shape, generator=torch.Generator().manual_seed(0))


def gradients(of: StableDiffusion3) -> dict[str, Tensor]:
    of.velocity(Network.STUDENT, latents(of), SIGMA, of.encode_prompts(PROMPTS)).square().mean().backward()
    parameters = of.adapters.parameters("student")
    return {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_pipeline: Path, dtype: str) -> None:
    plain = gradients(backbone(tiny_pipeline, dtype=dtype))
    recomputed = gradients(backbone(tiny_pipeline, dtype=dtype, gradient_checkpointing=True))
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_bfloat16_is_close_and_comes_out_as_float32(tiny_pipeline: Path) -> None:
    results = []
    for dtype in ("float32", "bfloat16"):
        made = backbone(tiny_pipeline, dtype=dtype)
        with torch.no_grad():
            results.append(made.velocity(Network.STUDENT, latents(made), SIGMA, made.encode_prompts(PROMPTS)))
    exact, half = results
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    assert (half - exact).norm() < 0.03 * exact.norm()


def test_adapters_on_a_bfloat16_base_stay_float32_and_move(tiny_pipeline: Path) -> None:
    found = gradients(backbone(tiny_pipeline, dtype="bfloat16"))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all((gradient.abs().max() > 0) == (UNUSED_MODULE not in name) for name, gradient in found.items())


def test_idle_parts_come_back_for_their_work(tiny_pipeline: Path) -> None:
    plain, idle = backbone(tiny_pipeline), backbone(tiny_pipeline, idle_on_cpu=True)
    for name, tensor in plain.encode_prompts(PROMPTS).tensors.items():
        assert torch.equal(tensor, idle.encode_prompts(PROMPTS).tensors[name])
    assert torch.equal(plain.decode(latents(plain)), idle.decode(latents(idle)))


def test_int8_rounds_each_row_by_at_most_half_a_step() -> None:
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.27, -0.004], [0.0, 0.0], [-254.0, 3.0]]))
    small = Int8Linear(linear)
    assert small.weight_int8.tolist() == [[127, 0], [0, 0], [-127, 2]]
    assert torch.allclose(small.weight, torch.tensor([[1.27, 0.0], [0.0, 0.0], [-254.0, 4.0]]))
    inputs = torch.tensor([[1.0, 2.0]])
    expected = inputs @ torch.tensor([[1.27, 0.0, -254.0], [0.0, 0.0, 4.0]]) + linear.bias
    assert torch.allclose(small(inputs), expected)


def test_int8_text_encoders_say_nearly_the_same(tiny_pipeline: Path) -> None:
    exact, small = (
        backbone(tiny_pipeline, text_encoder_int8=chosen).encode_prompts(PROMPTS).tensors for chosen in (False, True)
    )
    for name, tensor in exact.items():
        assert not torch.equal(tensor, small[name])
        assert (small[name] - tensor).norm() < 0.02 * tensor.norm()


def test_int8_layers_take_one_byte_a_weight_and_four_a_row() -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU())
    quantise_linears(module)
    assert sum(part.numel() * part.element_size() for part in module.state_dict().values()) == 64 * 64 + 64 * 4
