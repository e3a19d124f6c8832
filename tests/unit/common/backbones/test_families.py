"""Properties of every model family: both stages change the adapters and nothing else, and diffusers loads the LoRA."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import seeding
from common.policies import SamplingSpec
from common.types import Network, Position, Prompt, Stage
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.training.lora_file import LORA_FILE, write_lora
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, COLD_START, FAKE_SCORE, Networks, StageSettings
from rollout_workers.sampler import EVALUATION, sample_for_evaluation
from tests.helpers.tiny_families import FAMILIES, STEPS, TinyFamily
from tests.helpers.tiny_pipeline import randomise, tiny_lora
from tests.helpers.tiny_training import (
    alignment_settings,
    alignment_trainer,
    changed,
    cold_start_settings,
    cold_start_trainer,
    scored_groups,
    snapshot,
    trainable,
)

PROMPT = Prompt(7, "a red circle")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return request.param


@pytest.fixture(scope="module")
def directory(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's pipelines; nobody writes to them."""
    directory = tmp_path_factory.mktemp(family.name)
    family.write(directory)
    return directory


def networks_of(family: TinyFamily, directory: Path) -> Networks:
    return Networks(family.load(directory), StageSettings.of(cold_start_settings()), seed=0)


def assert_changed(networks: Networks, family: TinyFamily, before: dict[str, torch.Tensor], adapters: set[str]) -> None:
    """Every parameter of the two trained adapters that a loss can reach, and no other."""
    found = changed(networks.backbone, before)
    expected = trainable(networks.backbone)
    assert found == {name for name in expected if not any(part in name for part in family.unused)}
    assert {name.split(".")[-1] for name in found} == adapters


@torch.no_grad()
def test_the_planned_operations_of_a_pass_are_those_that_torch_counts(family: TinyFamily, directory: Path) -> None:
    backbone = family.load(directory)
    conditioning, latents_Bchw = backbone.encode_prompts(["red"]), torch.randn(1, *backbone.latent_shape)
    # Its counter knows attention by the products it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.velocity(Network.TEACHER, latents_Bchw, torch.full((1,), 0.5), conditioning)
    sizes = type(backbone).sizes(backbone._settings, tiny_lora(("to_q",)))
    assert sizes.forward_flops == counter.get_total_flops()


@pytest.mark.usefixtures("one_thread")
def test_both_stages_train_and_a_restored_run_goes_on_bit_by_bit(
    family: TinyFamily, directory: Path, tmp_path: Path
) -> None:
    networks = networks_of(family, directory)
    trainer, before = cold_start_trainer(networks), snapshot(networks.backbone)
    for iteration in range(2):
        assert all(math.isfinite(value) for value in trainer.update(iteration).values().values())
    assert_changed(networks, family, before, {COLD_START, FAKE_SCORE})

    networks.begin_alignment(StageSettings.of(alignment_settings()))
    aligner, before = alignment_trainer(networks), snapshot(networks.backbone)
    metrics = []
    for iteration in range(2):
        metrics.append(aligner.update(scored_groups(networks.backbone, iteration))[0].values())
        assert all(math.isfinite(value) for value in metrics[-1].values())
        assert metrics[-1]["surrogate_gap"] < 1e-5
        if iteration == 0:
            saved = CheckpointStore(tmp_path).save(Position(Stage.ALIGNMENT, 1), networks.state(), {})
    assert_changed(networks, family, before, {ALIGNED, ALIGNED_FAKE_SCORE})

    restored = networks_of(family, directory)
    restored.begin_alignment(StageSettings.of(alignment_settings()))
    restored.load(Checkpoint.open(saved).state())
    again = alignment_trainer(restored).update(scored_groups(restored.backbone, 1))[0].values()
    assert again == metrics[1]
    after, wanted = restored.state(), networks.state()
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


@torch.no_grad()
def test_a_fresh_surrogate_reward_is_the_teacher(family: TinyFamily, directory: Path) -> None:
    """Also where guidance is an input, and where the teacher has a base of its own."""
    networks = networks_of(family, directory)
    networks.begin_alignment(StageSettings.of(alignment_settings(policy_gradient="surrogate_reward")))
    backbone = networks.backbone
    conditioning, latents = backbone.encode_prompts(["red"]), torch.randn(1, *backbone.latent_shape)
    teacher, surrogate = (
        backbone.velocity(network, latents, torch.full((1,), 0.5), conditioning)
        for network in (Network.TEACHER, Network.SURROGATE_REWARD)
    )
    assert torch.equal(teacher, surrogate)


def test_diffusers_loads_the_exported_student_and_draws_the_same_images(
    family: TinyFamily, directory: Path, tmp_path: Path
) -> None:
    """A stack of two adapters, exported as one; the sampler without noise against the pipeline itself."""
    backbone = family.load(directory)
    for seed, name in enumerate(("first", "second")):
        backbone.adapters.add(name, seed=seed, trainable=False)
        randomise(backbone, name, seed)
    backbone.adapters.define(Network.STUDENT, ("first", "second"))
    spec, empty = SamplingSpec(Network.STUDENT, STEPS, 1.0, eta=0.0), backbone.encode_prompts([""])
    with torch.no_grad():
        images = backbone.decode(sample_for_evaluation(backbone, [PROMPT], spec, seed=4, count=2, empty=empty))
    assert backbone.adapters.scale == 2
    write_lora(backbone, tmp_path)

    pipeline = family.pipeline.from_pretrained(family.pipeline_at(directory))
    pipeline.set_progress_bar_config(disable=True)

    def drawn() -> torch.Tensor:
        noise = seeding.initial_noise_Gchw(4, EVALUATION, PROMPT.index, 2, backbone.latent_shape)
        drawn = pipeline(
            prompt=PROMPT.text, num_images_per_prompt=2, latents=family.pack(noise), output_type="pt", **family.call
        )
        return drawn.images

    without = drawn()
    pipeline.load_lora_weights(tmp_path)
    assert (drawn() - images).abs().max() <= 1e-4
    assert (without - images).abs().max() > 1e-2

    # As a tool reads it that ignores the metadata, or writes the file again without them.
    pipeline.unload_lora_weights()
    save_file(load_file(tmp_path / LORA_FILE), tmp_path / "stripped.safetensors", metadata={"format": "pt"})
    pipeline.load_lora_weights(tmp_path, weight_name="stripped.safetensors")
    assert (drawn() - images).abs().max() <= 1e-4


def test_images_of_a_chunked_decoder_and_their_gradients_are_the_same(
    family: TinyFamily, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = family.load(directory)
    latents = torch.randn(5, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for chunk in (16, 2):
        monkeypatch.setattr(backbone, "_settings", backbone._settings.model_copy(update={"decode_chunk": chunk}))
        images = backbone.decode(latents)
        (gradient,) = torch.autograd.grad((images * torch.linspace(0, 1, images.shape[-1])).sum(), latents)
        results.append((images.detach(), gradient))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert results[0][1].abs().max() > 1e-3
    features = backbone.image_features(results[0][0])
    assert [feature.shape[1] for feature in features] == [4, 8]
    assert all(torch.isfinite(feature).all() for feature in features)
