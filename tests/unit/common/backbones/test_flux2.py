"""The FLUX.2 backbone: the pipeline's own arithmetic, two bases, a text encoder that stops early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from common import seeding
from common.backbones.base import guided_velocity
from common.backbones.flux2 import Flux2, unpatchify
from common.errors import ModelError
from common.policies import SamplingSpec
from common.types import Guidance, Network, Prompt
from rollout_workers.sampler import EVALUATION, sample_for_evaluation
from tests.helpers.tiny_flux2 import (
    HEIGHT,
    TEXT_LAYERS,
    TEXT_TOKENS,
    TOKEN_PIXELS,
    WIDTH,
    load_tiny_klein,
    write_tiny_dev,
    write_tiny_klein,
)

PROMPT = Prompt(7, "a red circle")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a klein base pipeline; nobody writes to it."""
    return write_tiny_klein(tmp_path_factory.mktemp("klein") / "base")


@pytest.fixture(scope="module")
def few_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of another, step-distilled one."""
    return write_tiny_klein(tmp_path_factory.mktemp("klein") / "distilled", seed=1, distilled=True)


@pytest.fixture(scope="module")
def backbone(klein: Path) -> Flux2:
    """Loaded once; no test changes it."""
    return load_tiny_klein(klein)


@pytest.fixture(scope="module")
def pipeline(klein: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(klein)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denormalised(backbone: Flux2, latents_Bchw: Tensor) -> Tensor:
    """Latents as a pipeline returns them: the VAE's."""
    with torch.no_grad():
        return backbone._vae_latents(latents_Bchw)


def sampled(backbone: Flux2, spec: SamplingSpec, count: int) -> Tensor:
    empty = backbone.encode_prompts([""])
    return sample_for_evaluation(backbone, [PROMPT], spec, seed=4, count=count, empty=empty)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_euler_sampler_equals_the_pipeline(backbone: Flux2, pipeline: Flux2KleinPipeline, guidance: float) -> None:
    steps, count = 5, 2
    latents = sampled(backbone, SamplingSpec(Network.TEACHER, steps, guidance, eta=0.0), count)
    expected = pipeline(
        prompt=PROMPT.text,
        num_images_per_prompt=count,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=seeding.initial_noise_Gchw(4, EVALUATION, PROMPT.index, count, backbone.latent_shape),
        max_sequence_length=TEXT_TOKENS,
        text_encoder_out_layers=TEXT_LAYERS,
        height=HEIGHT,
        width=WIDTH,
        output_type="latent",
    ).images
    assert latents.std() > 0.1
    assert (denormalised(backbone, latents) - expected).abs().max() <= 1e-4
    assert backbone.sigmas(steps) == pytest.approx(pipeline.scheduler.sigmas.tolist(), abs=1e-6)


def test_decoding_equals_the_pipeline(backbone: Flux2, pipeline: Flux2KleinPipeline) -> None:
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    images = backbone.decode(latents)
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    statistics, epsilon = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
    std = torch.sqrt(statistics.running_var.view(1, -1, 1, 1) + epsilon)
    raw = pipeline._unpatchify_latents(latents * std + statistics.running_mean.view(1, -1, 1, 1))
    expected = pipeline.image_processor.postprocess(pipeline.vae.decode(raw).sample, output_type="pt")
    assert torch.allclose(images, expected, atol=1e-6)


def test_unpatchify_by_hand() -> None:
    """The channels of a patch are (channel, row, column)."""
    patches = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert unpatchify(patches).tolist() == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]]


def test_shapes_follow_the_resolution(backbone: Flux2, klein: Path) -> None:
    assert backbone.latent_shape == (16, HEIGHT // TOKEN_PIXELS, WIDTH // TOKEN_PIXELS)
    assert load_tiny_klein(klein, height=None, width=32).latent_shape == (16, 64, 8)


def test_the_text_encoder_stops_at_the_last_layer_it_needs(backbone: Flux2, pipeline: Flux2KleinPipeline) -> None:
    found = backbone.encode_prompts(["a red circle", ""]).tensors["tokens_BLd"]
    expected, _ = pipeline.encode_prompt(
        ["a red circle", ""], max_sequence_length=TEXT_TOKENS, text_encoder_out_layers=TEXT_LAYERS
    )
    assert torch.equal(found, expected)
    assert (found[0] - found[1]).abs().max() > 0.1
    encoder = backbone._pipeline.text_encoder
    assert len(encoder.layers) == max(TEXT_LAYERS) < len(pipeline.text_encoder.model.layers)
    assert all("lm_head" not in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>"])
def test_a_special_token_in_a_prompt_is_plain_text(backbone: Flux2, token: str) -> None:
    tokenizer = backbone._pipeline.tokenizer
    seen: list[str] = []
    encode = backbone._pipeline.encode_prompt
    backbone._pipeline.encode_prompt = lambda prompt, **rest: (seen.extend(prompt), encode(prompt=prompt, **rest))[1]
    try:
        backbone.encode_prompts([f"a{token}{token}b"])
    finally:
        del backbone._pipeline.encode_prompt
    ids = tokenizer(seen[0], add_special_tokens=False).input_ids
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids).replace(" ", "") == f"a{token}{token}b"


# ── two bases ────────────────────────────────────────────────────────────────────────────────────────────────────────


def velocity(backbone: Flux2, network: Network) -> Tensor:
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return backbone.velocity(network, latents, torch.tensor([0.9, 0.4]), backbone.encode_prompts(["red", "blue"]))


def test_the_student_starts_from_its_own_base(backbone: Flux2, klein: Path, few_step: Path) -> None:
    both, alone = load_tiny_klein(few_step, teacher=klein), load_tiny_klein(few_step, guidance_scale=1.0)
    both.adapters.add("s", seed=0, trainable=True)
    both.adapters.add("f", seed=0, trainable=True, network=Network.FAKE_SCORE)
    both.adapters.define(Network.STUDENT, ("s",))
    both.adapters.define(Network.FAKE_SCORE, ("f",))
    assert both.adapters.parameters("s").keys() == both.adapters.parameters("f").keys()

    student = velocity(alone, Network.TEACHER)
    alone._transformer.load_state_dict(backbone._transformer.state_dict())  # the text encoder stays the student's
    teacher = velocity(alone, Network.TEACHER)
    assert (student - teacher).abs().max() > 1e-2
    assert torch.equal(velocity(both, Network.STUDENT), student)
    assert torch.equal(velocity(both, Network.TEACHER), teacher)
    assert torch.equal(velocity(both, Network.FAKE_SCORE), teacher)

    assert both.guidance is Guidance.CLASSIFIER_FREE  # the teacher's
    assert len({one.base_fingerprint() for one in (both, alone, backbone)}) == 3
    with pytest.raises(ModelError, match="fake_score has a base of its own, but adapter 's' was added to another one"):
        both.adapters.define(Network.FAKE_SCORE, ("s",))


def test_a_resting_teacher_is_on_the_device_only_while_it_is_used(
    klein: Path, few_step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = load_tiny_klein(few_step, teacher=klein)
    both.adapters.define(Network.STUDENT, ())
    expected = {network: velocity(both, network) for network in (Network.STUDENT, Network.TEACHER)}
    moves: list[str] = []
    monkeypatch.setattr(both._teacher, "to", lambda device: moves.append("host" if device == "cpu" else "device"))
    velocity(both, Network.TEACHER)
    assert moves == []
    both.rest_teacher()
    for network in (Network.STUDENT, Network.TEACHER, Network.TEACHER, Network.STUDENT, Network.STUDENT):
        assert torch.equal(velocity(both, network), expected[network])
    assert moves == ["host", "device", "host"]


def test_the_teacher_of_one_base_never_rests(backbone: Flux2, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[object] = []
    monkeypatch.setattr(backbone._transformer, "to", moves.append)
    backbone.rest_teacher()
    velocity(backbone, Network.TEACHER)
    assert moves == []


# ── guidance ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_guidance_that_an_evaluation_gives_to_a_guidance_free_model_is_refused(few_step: Path) -> None:
    free = load_tiny_klein(few_step, guidance_scale=1.0)
    latents, sigma, empty = torch.zeros(1, *free.latent_shape), torch.tensor([0.5]), free.encode_prompts([""])
    with pytest.raises(ModelError, match=r"guidance 4 given to a model that takes none.*evaluation\.teacher_guidance"):
        guided_velocity(free, Network.TEACHER, latents, sigma, empty, empty, 4.0)


def test_dev_equals_its_pipeline_and_takes_guidance_as_an_input(tmp_path: Path) -> None:
    """The scale is the teacher's guidance input; student and fake score take student_guidance."""
    pipeline = write_tiny_dev(tmp_path / "dev")
    pipeline.set_progress_bar_config(disable=True)
    dev = load_tiny_klein(tmp_path / "dev")
    assert dev.guidance is Guidance.INPUT
    assert len(dev._pipeline.text_encoder.layers) == max(TEXT_LAYERS)
    dev.adapters.define(Network.STUDENT, ())
    for network, scale, guidance in (
        (Network.TEACHER, 1.0, 1.0),
        (Network.TEACHER, 5.0, 5.0),
        (Network.STUDENT, 1.0, 1.0),
    ):
        latents = sampled(dev, SamplingSpec(network, 4, scale, eta=0.0), 1)
        expected = pipeline(
            prompt=PROMPT.text,
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=seeding.initial_noise_Gchw(4, EVALUATION, PROMPT.index, 1, dev.latent_shape),
            max_sequence_length=TEXT_TOKENS,
            text_encoder_out_layers=TEXT_LAYERS,
            height=HEIGHT,
            width=WIDTH,
            output_type="latent",
        ).images
        tokens_BLc = latents.flatten(2).transpose(1, 2)  # what this pipeline calls latents
        assert (tokens_BLc - expected).abs().max() <= 1e-4


# ── what is refused before anything large is loaded ──────────────────────────────────────────────────────────────────


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **settings: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Flux2KleinPipeline, "from_pretrained", load)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"height": 18}, r"backbone\.height = 18: this model's images are multiples of 4: use 16 or 20"),
        ({"width": 2}, r"backbone\.width = 2: .*: use 4"),
        ({"text_encoder_layers": (1, 2, 5)}, r"text_encoder_layers = \[1, 2, 5\]: the text encoder at .* has 4 layers"),
        ({"text_encoder_layers": (1, 2)}, r"a text token is 32 numbers then, but the transformer at .* takes 48"),
        ({"text_encoder_layers": None}, r"text_encoder_layers = \[9, 18, 27\]: the text encoder at .* has 4 layers"),
        ({"teacher_path": "nowhere"}, "no pipeline at nowhere"),
    ],
)
def test_impossible_settings_are_refused_early(klein: Path, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        load_tiny_klein(klein, **changes)


@pytest.mark.usefixtures("nothing_loads")
def test_guidance_for_a_step_distilled_teacher_is_refused_early(few_step: Path) -> None:
    with pytest.raises(ModelError, match=r"guidance_scale = 3: the teacher takes no guidance.*teacher_path"):
        load_tiny_klein(few_step)


@pytest.mark.usefixtures("nothing_loads")
def test_a_teacher_of_another_shape_is_refused_early(klein: Path, tmp_path: Path) -> None:
    other = shutil.copytree(klein, tmp_path / "other")
    file = other / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_single_layers": 3}))
    with pytest.raises(ModelError, match=r"is no teacher for the student at .*num_single_layers = 3, the student's 2"):
        load_tiny_klein(klein, teacher=other)


@pytest.mark.parametrize(("part", "changed"), [("teacher", None), ("student", None), ("teacher", 1e-5)])
def test_a_teacher_is_compared_with_the_defaults_of_its_class(
    klein: Path, tmp_path: Path, part: str, changed: float | None
) -> None:
    """Keys that are left out, of either transformer, mean the defaults; `axes_dims_rope` is not the default here."""
    paths = {name: shutil.copytree(klein, tmp_path / name) for name in ("student", "teacher")}
    file = paths[part] / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["eps"], config["out_channels"]
    file.write_text(json.dumps(config | ({"eps": changed} if changed else {}) | {"decay": 0.9999}))
    if changed:
        with pytest.raises(ModelError, match=r"its transformer has eps = 1e-05, the student's 1e-06"):
            load_tiny_klein(paths["student"], teacher=paths["teacher"])
        return
    assert load_tiny_klein(paths["student"], teacher=paths["teacher"]).guidance is Guidance.CLASSIFIER_FREE


@pytest.mark.usefixtures("nothing_loads")
def test_a_teachers_option_that_its_class_does_not_know_is_refused(klein: Path, tmp_path: Path) -> None:
    other = shutil.copytree(klein, tmp_path / "other")
    file = other / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"qk_norm_eps": 0.1}))
    with pytest.raises(ModelError, match=r"other: its transformer/config\.json has qk_norm_eps = 0\.1, which Flux2Tr"):
        load_tiny_klein(klein, teacher=other)


def test_targets_default_to_the_familys_own(backbone: Flux2, klein: Path) -> None:
    fresh = load_tiny_klein(klein)
    fresh.adapters.add("s", seed=0, trainable=True)
    modules = {key.rsplit(".lora_", 1)[0] for key in fresh.adapters.parameters("s")}
    double = {
        f"transformer_blocks.0.attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    single = {
        f"single_transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in ("to_qkv_mlp_proj", "to_out")
    }
    assert modules == double | single
