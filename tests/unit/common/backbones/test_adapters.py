"""Adapters: which network runs, what trains, and what a stack of them is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from common.backbones.adapters import stacked_state
from common.backbones.base import Conditioning
from common.backbones.lora_targets import adapted_layers, suffixes
from common.backbones.sd3 import TIMESTEP_SCALE, StableDiffusion3
from common.config.backbones import Sd3Backbone
from common.errors import ModelError, WeightUpdateError
from common.types import Network
from tests.helpers.tiny_pipeline import T5_TOKENS, UNUSED_MODULE, load_tiny_backbone, randomise, tiny_lora


@pytest.fixture
def backbone(tiny_pipeline: Path) -> StableDiffusion3:
    """Student = frozen "first" + trainable "second"; fake score = trainable "fake"; all of them change something."""
    backbone = load_tiny_backbone(tiny_pipeline)
    for seed, (name, trainable) in enumerate((("first", False), ("second", True), ("fake", True))):
        backbone.adapters.add(name, seed=0, trainable=trainable)
        randomise(backbone, name, seed)
    backbone.adapters.define(Network.STUDENT, ("first", "second"))
    backbone.adapters.define(Network.FAKE_SCORE, ("fake",))
    return backbone


def inputs(backbone: StableDiffusion3) -> tuple[Tensor, Tensor, Conditioning]:
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    return latents, torch.tensor([0.9, 0.4]), backbone.encode_prompts(["a red circle", "a blue square"])


def velocity(backbone: StableDiffusion3, network: Network) -> Tensor:
    return backbone.velocity(network, *inputs(backbone))


def trainable(backbone: StableDiffusion3) -> set[str]:
    return {name for name, parameter in backbone._transformer.named_parameters() if parameter.requires_grad}


def test_only_the_declared_adapters_train_whatever_network_runs(backbone: StableDiffusion3) -> None:
    declared = trainable(backbone)
    assert declared
    assert all(".second." in name or ".fake." in name for name in declared)
    for network in Network:
        velocity(backbone, network)
        assert trainable(backbone) == declared
        with backbone.adapters.active(network):
            assert trainable(backbone) == declared


def test_freezing_holds_through_a_switch(backbone: StableDiffusion3) -> None:
    backbone.adapters.freeze("second")
    velocity(backbone, Network.STUDENT)
    assert all(".fake." in name for name in trainable(backbone))


def test_each_network_is_another_function_and_the_teacher_is_the_bare_base(
    backbone: StableDiffusion3, tiny_pipeline: Path
) -> None:
    with torch.no_grad():
        found = {network: velocity(backbone, network) for network in Network}
        latents, sigma, conditioning = inputs(backbone)
        bare = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline).transformer(
            hidden_states=latents,
            timestep=sigma * TIMESTEP_SCALE,
            encoder_hidden_states=conditioning.tensors["tokens_BLd"],
            pooled_projections=conditioning.tensors["pooled_Bd"],
            return_dict=False,
        )[0]
    assert torch.equal(found[Network.TEACHER], bare)
    assert (found[Network.STUDENT] - bare).abs().max() > 1e-2
    assert (found[Network.STUDENT] - found[Network.FAKE_SCORE]).abs().max() > 1e-2


def test_blocks_nest_and_an_exception_restores_the_network_before(backbone: StableDiffusion3) -> None:
    with backbone.adapters.active(Network.STUDENT):
        with pytest.raises(RuntimeError), backbone.adapters.active(Network.TEACHER):
            raise RuntimeError
        inside = backbone.adapters._active
    assert inside == ("first", "second")
    assert backbone.adapters._active == ()


def test_a_fresh_adapter_changes_nothing(tiny_pipeline: Path) -> None:
    backbone = load_tiny_backbone(tiny_pipeline)
    backbone.adapters.add("first", seed=0, trainable=True)
    backbone.adapters.define(Network.STUDENT, ("first",))
    assert torch.equal(velocity(backbone, Network.STUDENT), velocity(backbone, Network.TEACHER))


def test_initialisation_is_a_function_of_seed_and_name(tiny_pipeline: Path) -> None:
    def fresh(name: str, seed: int) -> dict[str, Tensor]:
        backbone = load_tiny_backbone(tiny_pipeline)
        torch.manual_seed(seed + 100)  # must not matter
        backbone.adapters.add(name, seed=seed, trainable=True)
        return backbone.adapters.state(name)

    first, again, other_seed, other_name = fresh("x", 1), fresh("x", 1), fresh("x", 2), fresh("y", 1)
    gaussian = [key for key in first if ".lora_A." in key]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other_seed[key]) for key in gaussian)
    assert not any(torch.equal(first[key], other_name[key]) for key in gaussian)
    assert all(not first[key].any() for key in first if ".lora_B." in key)


@pytest.mark.usefixtures("one_thread")
def test_a_bfloat16_base_has_adapters_that_a_small_step_changes(tiny_pipeline: Path) -> None:
    settings = Sd3Backbone(path=tiny_pipeline, max_sequence_length=T5_TOKENS, dtype="bfloat16")
    backbone = StableDiffusion3(settings, tiny_lora(), torch.device("cpu"))
    for name in ("first", "second"):
        backbone.adapters.add(name, seed=0, trainable=name == "first")
        randomise(backbone, name, seed=1)
    backbone.adapters.define(Network.STUDENT, ("first", "second"))
    parameters = backbone.adapters.parameters("first")
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert next(backbone._vae.parameters()).dtype == torch.bfloat16
    before = backbone.adapters.state("first")
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-6)
    (velocity(backbone, Network.STUDENT) - velocity(backbone, Network.TEACHER)).square().mean().backward()
    optimizer.step()
    after = backbone.adapters.state("first")
    for key, value in before.items():
        if ".lora_B." in key and not key.startswith(UNUSED_MODULE):
            assert (after[key] != value).all(), key


def test_a_stack_equals_one_adapter_of_concatenated_ranks(backbone: StableDiffusion3, tiny_pipeline: Path) -> None:
    """Exported with its scale, and loaded by diffusers itself."""
    merged = stacked_state([backbone.adapters.state("first"), backbone.adapters.state("second")])
    latents, sigma, conditioning = inputs(backbone)
    with torch.no_grad():
        stacked = backbone.velocity(Network.STUDENT, latents, sigma, conditioning)
    directory = tiny_pipeline.parent / "exported"
    backbone.save_lora(directory, merged, backbone.adapters.scale)

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(directory)
    with torch.no_grad():
        loaded = pipeline.transformer(
            hidden_states=latents,
            timestep=sigma * TIMESTEP_SCALE,
            encoder_hidden_states=conditioning.tensors["tokens_BLd"],
            pooled_projections=conditioning.tensors["pooled_Bd"],
            return_dict=False,
        )[0]
    assert (loaded - stacked).abs().max() <= 1e-5
    assert (velocity(backbone, Network.TEACHER) - stacked).abs().max() > 1e-2


def gradients(backbone: StableDiffusion3, *, other_network_in_between: bool) -> dict[str, Tensor]:
    output = velocity(backbone, Network.STUDENT)
    if other_network_in_between:
        other = velocity(backbone, Network.FAKE_SCORE)
        with backbone.adapters.active(Network.FAKE_SCORE):
            (output.square().mean() + 0 * other.mean()).backward()
    else:
        output.square().mean().backward()
    found = {}
    for key, parameter in backbone.adapters.parameters("second").items():
        assert parameter.grad is not None
        found[key] = parameter.grad.clone()
        parameter.grad = None
    return found


def test_checkpointing_recomputes_through_the_network_of_the_forward_pass(backbone: StableDiffusion3) -> None:
    expected = gradients(backbone, other_network_in_between=False)
    declared = trainable(backbone)
    backbone.enable_gradient_checkpointing()
    found = gradients(backbone, other_network_in_between=True)
    assert all(expected[key].abs().max() > 0 for key in expected if not key.startswith(UNUSED_MODULE))
    assert all(torch.allclose(found[key], expected[key], atol=1e-7) for key in expected)
    assert trainable(backbone) == declared
    assert backbone.adapters._active == ()


@pytest.mark.parametrize("targets", [("nothing_here",), ("to_q", "to_kk"), ("transformer_blocks",)])
def test_targets_that_bind_to_nothing_are_refused(tiny_pipeline: Path, targets: tuple[str, ...]) -> None:
    backbone = load_tiny_backbone(tiny_pipeline, tiny_lora(targets))
    with pytest.raises(ModelError, match=rf"lora\.targets \['{targets[-1]}'\] bind to no module"):
        backbone.adapters.add("first", seed=0, trainable=True)
    assert backbone.adapters.parameters("first") == {}


KEY = "transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_change_nothing(backbone: StableDiffusion3, damage: str) -> None:
    before = backbone.adapters.state("first")
    state = {key: value + 1 for key, value in before.items()}
    if damage == "missing":
        del state[KEY]
    elif damage == "unknown":
        state["somewhere.else.lora_A.weight"] = state[KEY]
    else:
        state[KEY] = state[KEY][:1]
    expected = {"missing": r"1 missing .*to_q", "unknown": r"1 unknown .*somewhere", "shape": r"is \[1, 16\], expected"}
    with pytest.raises(WeightUpdateError, match=f"adapter 'first'.*{expected[damage]}"):
        backbone.adapters.load("first", state)
    after = backbone.adapters.state("first")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_state_is_a_copy_and_load_takes_it_back(backbone: StableDiffusion3) -> None:
    saved = backbone.adapters.state("second")
    before = velocity(backbone, Network.STUDENT).detach()
    randomise(backbone, "second", seed=9)
    assert not torch.equal(velocity(backbone, Network.STUDENT), before)
    backbone.adapters.load("second", saved)
    assert torch.equal(velocity(backbone, Network.STUDENT), before)


@pytest.mark.parametrize(("init_std", "expected"), [(None, 1 / 2), (1.0, 1.0), (0.25, 0.25)])
def test_a_fresh_adapter_has_a_gaussian_a_of_the_asked_width_and_no_effect(
    tiny_pipeline: Path, init_std: float | None, expected: float
) -> None:
    fresh = load_tiny_backbone(tiny_pipeline)
    fresh.adapters.add("new", seed=0, trainable=True, init_std=init_std)
    fresh.adapters.define(Network.STUDENT, ("new",))
    parameters = fresh.adapters.parameters("new")
    values = torch.cat([value.flatten() for key, value in parameters.items() if ".lora_A." in key])
    assert values.std().item() == pytest.approx(expected, rel=0.1)
    assert all(value.abs().max() == 0 for key, value in parameters.items() if ".lora_B." in key)
    fresh.adapters.define(Network.TEACHER, ())
    assert torch.equal(velocity(fresh, Network.STUDENT), velocity(fresh, Network.TEACHER))


def test_the_layers_of_an_adapter_and_the_targets_that_bind_to_them() -> None:
    state = [f"blocks.{block}.attn.to_out.0.lora_{part}.weight" for block in (0, 11) for part in "AB"]
    layers = adapted_layers([*state, "proj_out.lora_A.weight"])
    assert layers == ("blocks.0.attn.to_out.0", "blocks.11.attn.to_out.0", "proj_out")
    assert suffixes(layers) == ["attn.to_out.0", "proj_out"]


def test_a_target_that_names_containers_alone_is_refused(tiny_pipeline: Path) -> None:
    """SD3's `attn.to_out` is a list of layers; FLUX.2's single-stream blocks have a layer of that name."""
    backbone = load_tiny_backbone(tiny_pipeline, tiny_lora(("attn.to_out",)))
    with pytest.raises(ModelError, match=r"\['attn.to_out'\] bind to no module"):
        backbone.adapters.add("new", seed=0, trainable=True)
