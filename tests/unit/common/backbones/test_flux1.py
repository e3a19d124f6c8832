"""The FLUX.1 backbone: the pipeline's own arithmetic, and guidance as an input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from common import seeding
from common.backbones.base import guided_velocity
from common.backbones.flux1 import Flux1, pack, unpack
from common.errors import ModelError
from common.policies import SamplingSpec
from common.types import Guidance, Network, Prompt
from rollout_workers.sampler import EVALUATION, sample_for_evaluation
from tests.helpers.tiny_flux1 import HEIGHT, WIDTH, load_tiny_flux1, write_tiny_flux1
from tests.helpers.tiny_pipeline import T5_TOKENS

PROMPT = Prompt(7, "a red circle")


@pytest.fixture(scope="module")
def flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_flux1(tmp_path_factory.mktemp("flux1") / "dev")


@pytest.fixture(scope="module")
def backbone(flux1: Path) -> Flux1:
    """Loaded once; no test changes it."""
    return load_tiny_flux1(flux1)


@pytest.fixture(scope="module")
def pipeline(flux1: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(flux1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("network", "scale", "guidance"),
    [
        (Network.TEACHER, 1.0, 1.0),
        (Network.TEACHER, 5.0, 5.0),
        (Network.STUDENT, 1.0, 1.5),
        (Network.FAKE_SCORE, 1.0, 1.5),
    ],
)
def test_the_euler_sampler_equals_the_pipeline(
    backbone: Flux1, pipeline: FluxPipeline, network: Network, scale: float, guidance: float
) -> None:
    """The scale is the teacher's guidance input; student and fake score take student_guidance."""
    steps, count = 5, 2
    for other in (Network.STUDENT, Network.FAKE_SCORE):
        backbone.adapters.define(other, ())
    spec = SamplingSpec(network, steps, scale, eta=0.0)
    empty = backbone.encode_prompts([""])
    latents = sample_for_evaluation(backbone, [PROMPT], spec, seed=4, count=count, empty=empty)
    expected = pipeline(
        PROMPT.text,
        num_images_per_prompt=count,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=pack(seeding.initial_noise_Gchw(4, EVALUATION, PROMPT.index, count, backbone.latent_shape)),
        max_sequence_length=T5_TOKENS,
        height=HEIGHT,
        width=WIDTH,
        output_type="latent",
    ).images
    assert latents.std() > 0.1
    assert (pack(latents) - expected).abs().max() <= 1e-4
    assert backbone.sigmas(steps) == pytest.approx(pipeline.scheduler.sigmas.tolist(), abs=1e-6)


def test_packing_is_the_pipelines_and_unpacks(pipeline: FluxPipeline) -> None:
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(pack(latents), pipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(pack(latents), 4, 6), latents)


def test_decoding_equals_the_pipeline(backbone: Flux1, pipeline: FluxPipeline) -> None:
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    vae = pipeline.vae
    raw = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    images = backbone.decode(latents)
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    assert torch.allclose(images, pipeline.image_processor.postprocess(raw, output_type="pt"), atol=1e-6)


def test_guidance_is_an_input_and_doubles_no_pass(backbone: Flux1, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    original = backbone._predict

    def spy(transformer: torch.nn.Module, latents: Tensor, *rest: object) -> Tensor:
        batches.append(len(latents))
        return original(transformer, latents, *rest)

    monkeypatch.setattr(backbone, "_predict", spy)
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    sigma, conditioning = torch.tensor([0.8, 0.3]), backbone.encode_prompts(["red", "blue"])
    with torch.no_grad():
        own = backbone.velocity(Network.TEACHER, latents, sigma, conditioning)
        same, more = (
            guided_velocity(backbone, Network.TEACHER, latents, sigma, conditioning, conditioning.rows(slice(1)), scale)
            for scale in (3.0, 6.0)
        )
    assert batches == [2, 2, 2]
    assert torch.equal(own, same)
    assert (more - own).abs().max() > 1e-4


@pytest.mark.parametrize("token", ["<|endoftext|>", "</s>"])
def test_a_special_token_in_a_prompt_is_plain_text(backbone: Flux1, token: str) -> None:
    for tokenizer in (backbone._pipeline.tokenizer, backbone._pipeline.tokenizer_2):
        ids = tokenizer(f"a {token} b", add_special_tokens=False).input_ids
        assert ids
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_guidance_for_a_model_without_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schnell = write_tiny_flux1(tmp_path / "schnell", guidance=False)
    free = load_tiny_flux1(schnell, guidance_scale=1.0)
    assert free.guidance is Guidance.NONE
    monkeypatch.setattr(FluxPipeline, "from_pretrained", None)  # not reached
    with pytest.raises(ModelError, match=r"guidance_scale = 3\.5: the teacher takes no guidance: set it to 1"):
        load_tiny_flux1(schnell, guidance_scale=3.5)


def test_a_resolution_that_does_not_divide_is_refused_early(flux1: Path) -> None:
    with pytest.raises(ModelError, match=r"backbone\.width = 30: this model's images are multiples of 4: use 28 or 32"):
        load_tiny_flux1(flux1, width=30)


def test_targets_default_to_the_attention_of_both_kinds_of_block(flux1: Path) -> None:
    fresh = load_tiny_flux1(flux1)
    fresh.adapters.add("s", seed=0, trainable=True)
    modules = {key.rsplit(".lora_", 1)[0] for key in fresh.adapters.parameters("s")}
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert modules == {f"transformer_blocks.0.attn.{name}" for name in double} | {
        f"single_transformer_blocks.0.attn.{name}" for name in double[:3]
    }
