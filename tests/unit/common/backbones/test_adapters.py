"""Adapters: which network runs, what trains, and what a stack of them is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import FrameType

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from common.backbones.adapters import stacked_state
from common.backbones.base import Conditioning
from common.backbones.lora_linear import LoraLinear
from common.backbones.lora_targets import adapted_layers, suffixes
from common.backbones.sd3 import TIMESTEP_SCALE, StableDiffusion3
from common.config.backbones import Sd3Backbone
from common.errors import ModelError, WeightUpdateError
from common.types import Network
from learner.training.optimizer import AdapterOptimizer, LearningRate, OptimizerSettings
from tests.helpers.tiny_pipeline import T5_TOKENS, UNUSED_MODULE, load_tiny_backbone, randomise, tiny_lora

KEY = "transformer_blocks.0.attn.to_q.lora_A.weight"
NETWORKS = (Network.TEACHER, Network.STUDENT, Network.FAKE_SCORE)
"""Those that every run has."""


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
    assert {name.rpartition(".")[2] for name in declared} == {"second", "fake"}
    for network in NETWORKS:
        velocity(backbone, network)
        assert trainable(backbone) == declared
        with backbone.adapters.active(network):
            assert trainable(backbone) == declared


def test_freezing_holds_through_a_switch(backbone: StableDiffusion3) -> None:
    backbone.adapters.freeze("second")
    velocity(backbone, Network.STUDENT)
    assert {name.rpartition(".")[2] for name in trainable(backbone)} == {"fake"}


def test_a_parameter_that_was_switched_behind_the_bank_is_named(backbone: StableDiffusion3) -> None:
    backbone.adapters.parameters("second")[KEY].requires_grad_(False)
    with pytest.raises(ModelError, match=r"attn\.to_q\.lora_A\.second no longer trains: leave requires_grad to"):
        backbone.adapters.freeze("fake")
    backbone._transformer.requires_grad_(True)
    with pytest.raises(ModelError, match=r"pos_embed\.proj\.weight trains, but was declared frozen"):
        backbone.adapters.add("another", seed=0, trainable=True)


def test_each_network_is_another_function_and_the_teacher_is_the_bare_base(
    backbone: StableDiffusion3, tiny_pipeline: Path
) -> None:
    with torch.no_grad():
        found = {network: velocity(backbone, network) for network in NETWORKS}
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
        inside = backbone.adapters._active.name
    assert inside == Network.STUDENT
    assert backbone.adapters._active.name == ""


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


@pytest.mark.parametrize("stack", [("first", "second"), ("second",)])
def test_checkpointing_recomputes_through_the_network_of_the_forward_pass(
    backbone: StableDiffusion3, stack: tuple[str, ...]
) -> None:
    backbone.adapters.define(Network.STUDENT, stack)
    expected = gradients(backbone, other_network_in_between=False)
    declared = trainable(backbone)
    backbone.enable_gradient_checkpointing()
    found = gradients(backbone, other_network_in_between=True)
    assert all(expected[key].abs().max() > 0 for key in expected if not key.startswith(UNUSED_MODULE))
    assert all(torch.allclose(found[key], expected[key], atol=1e-7) for key in expected)
    assert trainable(backbone) == declared
    assert backbone.adapters._active.name == ""


@pytest.mark.parametrize("targets", [("nothing_here",), ("to_q", "to_kk"), ("transformer_blocks",)])
def test_targets_that_bind_to_nothing_are_refused(tiny_pipeline: Path, targets: tuple[str, ...]) -> None:
    backbone = load_tiny_backbone(tiny_pipeline, tiny_lora(targets))
    with pytest.raises(ModelError, match=rf"lora\.targets \['{targets[-1]}'\] bind to no module"):
        backbone.adapters.add("first", seed=0, trainable=True)
    assert backbone.adapters.parameters("first") == {}


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


def state_of(layers: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Tensor]:
    """An adapter on layers of these inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, (inputs, outputs) in layers.items():
        state[f"{path}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
        state[f"{path}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    return state


def test_an_adapter_is_one_tensor_whose_changes_count_wherever_they_are_made(backbone: StableDiffusion3) -> None:
    bank = backbone.adapters
    adapter, parameters = bank.adapter("second"), bank.parameters("second")
    assert torch.equal(adapter.flat_n, torch.cat([parameter.flatten() for parameter in parameters.values()]))
    found = [key for key, _ in backbone._transformer.named_parameters() if key.endswith("second")]
    assert [key.replace(".weight", ".second") for key in parameters] == found
    before = velocity(backbone, Network.STUDENT).detach()
    with torch.no_grad():
        parameters[KEY].add_(1)
    one = velocity(backbone, Network.STUDENT).detach()
    adapter.flat_n.zero_()
    bare = velocity(backbone, Network.STUDENT).detach()
    bank.define(Network.STUDENT, ("first",))
    assert not torch.equal(one, before)
    assert (bare - velocity(backbone, Network.STUDENT)).abs().max() <= 1e-6


def test_a_base_that_is_moved_after_it_got_adapters_is_refused(backbone: StableDiffusion3) -> None:
    """Its parameters would have memory of their own, whose changes nobody counts."""
    before = velocity(backbone, Network.STUDENT)
    nn.Module.to(backbone._transformer, "cpu", torch.float32)
    assert torch.equal(velocity(backbone, Network.STUDENT), before)
    nn.Module.to(backbone._transformer, torch.float64)
    with pytest.raises(ModelError, match=r"adapter 'first': .* was moved or copied away"):
        velocity(backbone, Network.STUDENT)


def test_a_copy_of_a_bank_is_refused(backbone: StableDiffusion3) -> None:
    with (
        pytest.raises(ModelError, match=r"adapter 'first': .* was moved or copied away"),
        deepcopy(backbone.adapters).active(Network.STUDENT),
    ):
        pass


WIDTH = 16
TO_Q, FEED = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"


def test_adapters_of_other_ranks_on_other_layers_add_up(backbone: StableDiffusion3, tiny_pipeline: Path) -> None:
    """As the base with the adapters merged into its weights, times alpha / rank = 4 / 2; and as one adapter."""
    bank = backbone.adapters
    wide = state_of({TO_Q: (WIDTH, WIDTH), FEED: (4 * WIDTH, WIDTH)}, rank=3, seed=5)
    bank.attach("wide", wide)
    bank.define(Network.STUDENT, ("first", "wide"))
    with torch.no_grad():
        found = velocity(backbone, Network.STUDENT)
        merged = load_tiny_backbone(tiny_pipeline)
        for state in (bank.state("first"), wide):
            for layer in adapted_layers(state):
                update = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
                merged._transformer.get_parameter(f"{layer}.weight").add_(4 / 2 * update)
        assert (found - velocity(merged, Network.TEACHER)).abs().max() <= 1e-6
        one = load_tiny_backbone(tiny_pipeline)
        one.adapters.attach("one", stacked_state([bank.state("first"), wide]))
        one.adapters.define(Network.STUDENT, ("one",))
        assert one.adapters.parameters("one")[f"{FEED}.lora_A.weight"].shape == (2 + 3, 4 * WIDTH)
        assert (found - velocity(one, Network.STUDENT)).abs().max() <= 1e-6
        assert (found - velocity(backbone, Network.TEACHER)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("layers", "edit", "message"),
    [
        ({"block.to_q": (16, 16)}, None, r"adapter 'own' fits no layer of this model: block\.to_q is not a linear"),
        ({"pos_embed.proj": (16, 16)}, None, r"fits no layer of this model: pos_embed\.proj is not a linear layer"),
        ({TO_Q: (8, 16)}, None, r"'own' does not fit transformer_blocks\.0\.attn\.to_q: its A and B are \[3, 8\] and"),
        ({TO_Q: (16, 8)}, None, r"A and B are \[3, 16\] and \[8, 3\], expected \[rank, 16\] and \[16, rank\]"),
        ({TO_Q: (16, 16)}, f"{TO_Q}.lora_B.weight", r"its A and B are \[3, 16\] and None"),
    ],
)
def test_an_adapter_that_fits_no_layer_is_named_and_changes_nothing(
    backbone: StableDiffusion3, layers: dict[str, tuple[int, int]], edit: str | None, message: str
) -> None:
    state = state_of({FEED: (4 * WIDTH, WIDTH)} | layers, rank=3, seed=0)
    if edit:
        del state[edit]
    before = dict(backbone._transformer.named_parameters())
    with pytest.raises(WeightUpdateError, match=message):
        backbone.adapters.attach("own", state)
    assert backbone.adapters.parameters("own") == {}
    assert dict(backbone._transformer.named_parameters()).keys() == before.keys()


class PackedLinear(nn.Linear):
    """As of bitsandbytes: a linear layer by type, whose weight is packed."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def test_a_base_that_takes_no_adapter_is_named(tiny_pipeline: Path) -> None:
    backbone = load_tiny_backbone(tiny_pipeline)
    feed = backbone._transformer.get_submodule(FEED)
    feed.weight = nn.Parameter(torch.zeros(WIDTH, 4 * WIDTH, dtype=torch.float8_e4m3fn), requires_grad=False)
    backbone._transformer.set_submodule(TO_Q, PackedLinear(WIDTH, WIDTH))
    with pytest.raises(ModelError, match=rf"{FEED} takes no adapter, its weight is float8_e4m3fn: use a base of"):
        backbone.adapters.attach("own", state_of({FEED: (4 * WIDTH, WIDTH)}, rank=3, seed=0))
    with pytest.raises(ModelError, match=rf"{TO_Q} takes no adapter, it is a PackedLinear, which computes in a way of"):
        backbone.adapters.add("first", seed=0, trainable=True)
    assert not backbone.adapters.parameters("first")
    assert not any(isinstance(part, LoraLinear) for part in backbone._transformer.modules())


def test_an_adapter_without_weights_is_named(backbone: StableDiffusion3) -> None:
    with pytest.raises(WeightUpdateError, match="adapter 'own' has no weights: expected LAYER"):
        backbone.adapters.attach("own", {})


def test_a_name_is_used_once_and_a_network_needs_adapters_that_were_added(backbone: StableDiffusion3) -> None:
    with pytest.raises(ModelError, match="adapter 'first' was added before"):
        backbone.adapters.add("first", seed=0, trainable=True)
    with pytest.raises(ModelError, match=r"student has no adapter 'other': add it first \(added: \['fake', 'first'"):
        backbone.adapters.define(Network.STUDENT, ("first", "other"))


def test_a_step_of_the_learners_optimizer_changes_the_next_pass(backbone: StableDiffusion3) -> None:
    """torch does not count what a fused step changes; the learner's optimizer does."""
    settings = OptimizerSettings(LearningRate(1e-3, "constant", 1), 0.0, 1.0)
    optimizer = AdapterOptimizer("student", backbone.adapters.adapter("second"), settings)
    before = velocity(backbone, Network.STUDENT)
    with optimizer.gathering():
        before.square().mean().backward()
    optimizer.step(0)
    assert (velocity(backbone, Network.STUDENT) - before).abs().max() > 1e-4


def test_no_pass_runs_code_of_peft(backbone: StableDiffusion3) -> None:
    files: set[str] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        files.add(frame.f_code.co_filename)

    backbone.enable_gradient_checkpointing()
    sys.setprofile(record)
    try:
        velocity(backbone, Network.STUDENT).square().mean().backward()
        velocity(backbone, Network.FAKE_SCORE)
        velocity(backbone, Network.TEACHER)
    finally:
        sys.setprofile(None)
    assert any(file.endswith("lora_linear.py") for file in files)
    assert [file for file in files if "/peft/" in file] == []


def test_a_switch_does_not_visit_the_layers(backbone: StableDiffusion3) -> None:
    with torch.no_grad():
        velocity(backbone, Network.STUDENT)
    lines: list[str] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            lines.append(frame.f_code.co_name)

    def switched() -> int:
        lines.clear()
        sys.setprofile(record)
        try:
            with backbone.adapters.active(Network.STUDENT), backbone.adapters.active(Network.TEACHER):
                pass
        finally:
            sys.setprofile(None)
        return len(lines)

    switched()
    few = switched()
    layers = {path: (part.in_features, part.out_features) for path, part in linear_layers(backbone).items()}
    backbone.adapters.attach("everywhere", state_of(layers, rank=1, seed=0))
    backbone.adapters.define(Network.STUDENT, ("first", "everywhere"))
    switched()
    assert switched() == few


def linear_layers(backbone: StableDiffusion3) -> dict[str, nn.Linear]:
    return {
        path.removesuffix(".base"): part
        for path, part in backbone._transformer.named_modules()
        if isinstance(part, nn.Linear)
    }


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
