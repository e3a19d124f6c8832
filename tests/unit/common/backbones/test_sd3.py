"""The SD3 backbone: the pipeline's own arithmetic, prompts as plain text, broken directories by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from common import seeding
from common.backbones.base import Conditioning, guided_velocity
from common.backbones.sd3 import StableDiffusion3
from common.config.run import LoraConfig
from common.errors import ModelError
from common.policies import SamplingSpec
from common.types import Network, Prompt
from rollout_workers.sampler import EVALUATION, sample_for_evaluation
from tests.helpers.tiny_pipeline import (
    IMAGE_SIDE,
    LATENT_SIDE,
    T5_TOKENS,
    load_tiny_backbone,
    randomise,
    write_tiny_pipeline,
)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> StableDiffusion3:
    """Loaded once; no test changes it."""
    return load_tiny_backbone(tiny_pipeline)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_euler_sampler_equals_the_pipeline(
    backbone: StableDiffusion3, tiny_pipeline: Path, guidance: float
) -> None:
    """On our schedule: the pipeline takes it as raw steps and shifts them itself (its default is spaced otherwise)."""
    prompt, steps, count = Prompt(7, "a red circle"), 5, 2
    latents = sample_for_evaluation(
        backbone,
        [prompt],
        SamplingSpec(Network.TEACHER, steps, guidance, eta=0.0),
        seed=4,
        count=count,
        empty=backbone.encode_prompts([""]),
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt.text,
        num_images_per_prompt=count,
        sigmas=[1.0, 0.8, 0.6, 0.4, 0.2],
        guidance_scale=guidance,
        latents=seeding.initial_noise_Gchw(4, EVALUATION, prompt.index, count, backbone.latent_shape),
        max_sequence_length=T5_TOKENS,
        height=IMAGE_SIDE,
        width=IMAGE_SIDE,
        output_type="latent",
    ).images
    assert latents.std() > 0.1
    assert (latents - expected).abs().max() <= 1e-4


def test_decoding_equals_the_pipeline(backbone: StableDiffusion3, tiny_pipeline: Path) -> None:
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    images = backbone.decode(latents)
    assert images.shape == (2, 3, IMAGE_SIDE, IMAGE_SIDE)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    vae = pipeline.vae
    raw = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = pipeline.image_processor.postprocess(raw, output_type="pt")
    assert torch.allclose(images, expected, atol=1e-6)


def test_the_schedule_and_shapes_are_the_pipelines_own(backbone: StableDiffusion3) -> None:
    assert backbone.sigmas(4) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert backbone.latent_shape == (4, LATENT_SIDE, LATENT_SIDE)


def test_shapes_follow_the_resolution(tiny_pipeline: Path) -> None:
    """And the pipeline's own, where it is not square."""
    wide = load_tiny_backbone(tiny_pipeline, height=8, width=16)
    assert wide.latent_shape == (4, 4, 8)
    prompt, noise = Prompt(7, "red"), seeding.initial_noise_Gchw(4, EVALUATION, 7, 1, (4, 4, 8))
    spec, empty = SamplingSpec(Network.TEACHER, 2, 1.0, eta=0.0), wide.encode_prompts([""])
    latents = sample_for_evaluation(wide, [prompt], spec, seed=4, count=1, empty=empty)
    call = {"max_sequence_length": T5_TOKENS, "height": 8, "width": 16, "output_type": "latent"}
    expected = wide._pipeline(prompt.text, sigmas=[1.0, 0.5], guidance_scale=1.0, latents=noise, **call).images
    assert (latents - expected).abs().max() <= 1e-4
    assert wide.decode(latents).shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"height": 10}, r"backbone\.height = 10: this model's images are multiples of 4: use 8 or 12"),
        ({"width": 3}, r"backbone\.width = 3: .*: use 4"),
        ({"width": 20}, r"height x width = 16 x 20: this model has positions for sides up to 16"),
    ],
)
def test_an_impossible_resolution_is_refused_before_loading(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, sides: dict[str, int], expected: str
) -> None:
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)  # not reached
    with pytest.raises(ModelError, match=expected):
        load_tiny_backbone(tiny_pipeline, **sides)


def test_targets_default_to_the_joint_attention_alone(tmp_path: Path) -> None:
    """Not SD3.5-M's second attention of the image tokens, `attn2`, whose projections have the same names."""
    path = write_tiny_pipeline(tmp_path / "medium", dual_attention=(0,))
    backbone = load_tiny_backbone(path, LoraConfig(rank=2, alpha=4))
    assert any(".attn2.to_q" in name for name, _ in backbone._transformer.named_modules())
    backbone.adapters.add("s", seed=0, trainable=True)
    modules = {key.rsplit(".lora_", 1)[0] for key in backbone.adapters.parameters("s")}
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    both = {f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in names}
    assert modules == both - {"transformer_blocks.1.attn.to_add_out"}  # the last block drops what its text becomes


def test_features_run_from_shallow_to_deep(backbone: StableDiffusion3) -> None:
    features = backbone.image_features(torch.rand(2, 3, IMAGE_SIDE, IMAGE_SIDE))
    assert [tuple(feature.shape) for feature in features] == [(2, 4, 8, 8), (2, 8, 8, 8)]
    assert all(torch.isfinite(feature).all() for feature in features)


def test_guidance_extrapolates_from_the_empty_prompt(backbone: StableDiffusion3) -> None:
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.8, 0.3])
    conditioning, empty = backbone.encode_prompts(["a red circle", "blue"]), backbone.encode_prompts([""])
    with torch.no_grad():
        with_text = backbone.velocity(Network.TEACHER, latents, sigma, conditioning)
        without = backbone.velocity(Network.TEACHER, latents, sigma, empty.expand_to(2))
        guided = guided_velocity(backbone, Network.TEACHER, latents, sigma, conditioning, empty, 4.0)
        unguided = guided_velocity(backbone, Network.TEACHER, latents, sigma, conditioning, empty, 1.0)
    assert (with_text - without).abs().max() > 1e-3
    assert torch.allclose(guided, without + 4 * (with_text - without), atol=1e-5)
    assert torch.equal(unguided, with_text)


def test_a_prompt_does_not_depend_on_its_batch(backbone: StableDiffusion3) -> None:
    together, alone = backbone.encode_prompts(["a red circle", "blue"]), backbone.encode_prompts(["blue"])
    for name, tensor in alone.tensors.items():
        assert torch.allclose(together.tensors[name][1:], tensor, atol=1e-6)


def test_conditioning_repeats_prompts_in_the_order_of_their_groups() -> None:
    conditioning = Conditioning({"x_B": torch.tensor([1.0, 2.0])})
    assert conditioning.repeat(2).tensors["x_B"].tolist() == [1, 1, 2, 2]
    assert conditioning.rows(slice(1, 2)).tensors["x_B"].tolist() == [2]
    assert len(Conditioning.concatenate([conditioning, conditioning])) == 4


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SPELT_OUT = ("<|startoftext|>", "<|endoftext|>", "</s>", "<unk>", "<pad>")


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("token", SPELT_OUT)
def test_a_special_token_in_a_prompt_is_plain_text(backbone: StableDiffusion3, number: int, token: str) -> None:
    pipeline = backbone._pipeline
    tokenizer = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)[number - 1]
    for text in (token, f"a {token} b", f"a{token}{token}b"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_full_width_special_token_is_plain_text_too(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A tokenizer that normalises compatibility characters, as T5's does, would make one of it."""
    path = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    file = path / "tokenizer_3" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"normalizer": {"type": "NFKC"}}))
    tokenizer = load_tiny_backbone(path)._pipeline.tokenizer_3
    assert (
        tokenizer("\uff21\uff1c/s\uff1e", add_special_tokens=False).input_ids
        == tokenizer("A</s>", add_special_tokens=False).input_ids
    )
    assert tokenizer.eos_token_id not in tokenizer("\uff1c/s\uff1e", add_special_tokens=False).input_ids


def test_text_after_a_spelt_out_end_token_still_counts(backbone: StableDiffusion3) -> None:
    first, second = (backbone.encode_prompts([text]).tensors for text in ("</s>ab", "</s>cd"))
    assert all((first[name] - second[name]).abs().max() > 1e-4 for name in first)


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "red circle " * 1000, "<|endoftext|>" * 1000, "\u00e9\U0001f600\u200b", ""]
)
def test_any_prompt_has_a_finite_encoding_of_the_same_shape(backbone: StableDiffusion3, text: str) -> None:
    usual, unusual = backbone.encode_prompts(["a red circle"]), backbone.encode_prompts([text])
    for name, tensor in unusual.tensors.items():
        assert tensor.shape == usual.tensors[name].shape
        assert torch.isfinite(tensor).all()


# ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────────


def copy_of(pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "broken")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no pipeline at {tmp_path}/nowhere"):
        load_tiny_backbone(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3", "tokenizer_2", "scheduler"])
def test_a_missing_part_is_named(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    path = copy_of(tiny_pipeline, tmp_path)
    shutil.rmtree(path / part)
    with pytest.raises(ModelError, match=rf"cannot load the pipeline at {path}: .*{part}"):
        load_tiny_backbone(path)


@pytest.mark.parametrize(
    "file",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated_weights_are_named(tiny_pipeline: Path, tmp_path: Path, file: str, keep: float) -> None:
    path = copy_of(tiny_pipeline, tmp_path)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelError, match=f"cannot load the pipeline at {path}"):
        load_tiny_backbone(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"_class_name": "NoSuchPipeline"}'])
def test_a_broken_index_is_named(tiny_pipeline: Path, tmp_path: Path, content: str) -> None:
    path = copy_of(tiny_pipeline, tmp_path)
    (path / "model_index.json").write_text(content)
    with pytest.raises(ModelError, match=f"{path}"):
        load_tiny_backbone(path)


def test_another_kind_of_pipeline_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = copy_of(tiny_pipeline, tmp_path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match=rf"{path}.*FluxPipeline"):
        load_tiny_backbone(path)


def test_weights_of_another_shape_are_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = copy_of(tiny_pipeline, tmp_path)
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"joint_attention_dim": 48}))
    with pytest.raises(ModelError, match=f"cannot load the pipeline at {path}"):
        load_tiny_backbone(path)


def test_the_base_fingerprint_is_of_the_base_alone(tiny_pipeline: Path, tmp_path: Path) -> None:
    same = load_tiny_backbone(tiny_pipeline)
    before = same.base_fingerprint()
    same.adapters.add("student", seed=0, trainable=True)
    randomise(same, "student", seed=0)
    other = load_tiny_backbone(write_tiny_pipeline(tmp_path / "other", seed=1))
    assert same.base_fingerprint() == before == load_tiny_backbone(tiny_pipeline).base_fingerprint()
    assert other.base_fingerprint() != before
