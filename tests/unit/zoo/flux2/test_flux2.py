"""The second family's recipe: its parts are what FLUX.2's pipeline takes them for, and its student learns its walk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from torch import Tensor, nn

from zoo.checker.parsing import GoldChecker
from zoo.flux2.autoencoder import (
    PATCH_CHANNELS,
    SIDE,
    begin_with,
    decode_patches,
    encode_patches,
    new_flux2_autoencoder,
    patchify,
)
from zoo.flux2.student import SIGMAS, STUDENT_STEPS, guided_walk, walking_loss
from zoo.flux2.teacher import new_flux2_pipeline, new_flux2_transformer, velocity
from zoo.flux2.text_encoder import OUT_LAYERS, PROMPT_WIDTH, encode_captions, new_text_encoder
from zoo.measuring import Exam, to_pixels
from zoo.sd3.autoencoder import latent_means, new_autoencoder
from zoo.world.scenes import CANVAS, render_scenes, sample_grid_scenes
from zoo.world.tokenizers import MAX_PHRASES, qwen_tokenizer

WEIGHTS = Path(__file__).parents[4] / "zoo" / "weights"
LONGEST = "small red circle above big blue square and left of small green triangle on white"


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    vae = new_flux2_autoencoder()
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    parts = (new_flux2_transformer(), vae, new_text_encoder(tokenizer), tokenizer)
    made = new_flux2_pipeline(*(part.eval() if isinstance(part, nn.Module) else part for part in parts))
    made.set_progress_bar_config(disable=True)
    return made


def test_patches_are_diffusers_own() -> None:
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(patchify(latents), Flux2KleinPipeline._patchify_latents(latents))


def test_decoding_undoes_the_standardisation_of_encoding(pipeline: Flux2KleinPipeline) -> None:
    renders = render_scenes(sample_grid_scenes(2, seed=1), seed=1)
    patches = encode_patches(pipeline.vae, renders)
    assert patches.shape == (2, PATCH_CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        plain = pipeline.vae.decode(latent_means(pipeline.vae, renders)).sample
    torch.testing.assert_close(decode_patches(pipeline.vae, patches), plain, rtol=1e-3, atol=1e-4)


def test_the_outer_levels_begin_as_the_other_autoencoder_and_the_innermost_does_not() -> None:
    outer = new_autoencoder()
    before = new_flux2_autoencoder()
    untouched = {name: value.clone() for name, value in before.state_dict().items()}
    begun = begin_with(before, outer).state_dict()
    same_place = {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "encoder.down_blocks.1.resnets.0.conv1.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
        "decoder.up_blocks.3.resnets.1.conv2.weight": "decoder.up_blocks.2.resnets.1.conv2.weight",
        "decoder.conv_out.weight": "decoder.conv_out.weight",
    }
    for own, theirs in same_place.items():
        assert torch.equal(begun[own], outer.state_dict()[theirs])
        assert not torch.equal(begun[own], untouched[own])
    for own in ("encoder.down_blocks.3.resnets.0.conv1.weight", "decoder.conv_in.weight", "encoder.conv_out.weight"):
        assert torch.equal(begun[own], untouched[own])


def test_the_longest_caption_fits_between_start_and_end() -> None:
    tokenizer = qwen_tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": LONGEST}], tokenize=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens == [
        "<|im_start|>",
        "▁small▁red▁circle",
        "▁above",
        "▁big▁blue▁square",
        "▁and▁left▁of",
        "▁small▁green▁triangle",
        "▁on▁white",
        "<|im_end|>",
    ]
    assert len(tokens) == MAX_PHRASES


def test_velocity_is_what_the_pipeline_steps_by(pipeline: Flux2KleinPipeline) -> None:
    """One Euler step from pure noise to 0 leaves noise minus velocity."""
    noise = torch.randn(1, PATCH_CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    captions = encode_captions(pipeline, [LONGEST])
    assert captions.shape == (1, MAX_PHRASES, PROMPT_WIDTH)
    with torch.no_grad():
        clean = noise - velocity(pipeline.transformer, noise, torch.ones(1), captions.float())
        expected = pipeline(
            prompt=[LONGEST],
            height=CANVAS,
            width=CANVAS,
            latents=noise,
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=MAX_PHRASES,
            text_encoder_out_layers=OUT_LAYERS,
            output_type="latent",
        ).images
    spread = (pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt()[:, None, None]
    raw = clean * spread + pipeline.vae.bn.running_mean[:, None, None]
    torch.testing.assert_close(patchify(expected), raw, rtol=1e-3, atol=1e-3)


class Steady(nn.Module):
    """A transformer whose velocity is 2 with a caption of ones and 1 without."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (hidden_states * 0 + 1 + encoder_hidden_states.mean((1, 2))[:, None, None],)


def test_a_guided_walk_visits_the_student_levels_and_is_what_the_student_learns() -> None:
    """Guidance 4 makes of 2 and 1 the velocity 1 + 4 (2 - 1) = 5; a student that has it has nothing left to learn."""
    captions = torch.ones(3, MAX_PHRASES, PROMPT_WIDTH)
    visited = guided_walk(Steady(), captions, torch.zeros(1, MAX_PHRASES, PROMPT_WIDTH))
    assert visited.shape == (3, STUDENT_STEPS + 1, PATCH_CHANNELS, SIDE, SIDE)
    levels = SIGMAS[:: len(SIGMAS) // STUDENT_STEPS]
    assert levels == pytest.approx((1.0, 0.9545, 0.8749, 0.6997, 0.0), abs=1e-3)
    for place, level in enumerate(levels):
        torch.testing.assert_close(visited[:, place], visited[:, 0] + 5 * (level - 1), rtol=0, atol=1e-4)
    assert walking_loss(Steady(), visited, 4 * captions).item() == pytest.approx(0, abs=1e-6)
    assert walking_loss(Steady(), visited, captions).item() == pytest.approx(9, abs=1e-4)


def test_the_shipped_autoencoder_keeps_what_captions_tell_and_standardises_its_patches() -> None:
    vae = AutoencoderKLFlux2.from_pretrained(WEIGHTS / "flux2" / "base" / "vae", torch_dtype=torch.float32).eval()
    exam = Exam(GoldChecker.load(WEIGHTS / "checker"), count=128)
    patches = encode_patches(vae, exam.renders)
    assert patches.mean((0, 2, 3)).abs().max() < 0.15
    assert (patches.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert exam.gold(to_pixels(decode_patches(vae, patches))) >= 0.96


def test_base_and_start_differ_in_their_transformers_alone() -> None:
    files = sorted(path.relative_to(WEIGHTS / "flux2" / "base") for path in (WEIGHTS / "flux2" / "base").rglob("*.*"))
    differing = [
        str(file)
        for file in files
        if (WEIGHTS / "flux2" / "base" / file).read_bytes() != (WEIGHTS / "flux2" / "klein" / file).read_bytes()
    ]
    assert differing == ["model_index.json", "transformer/diffusion_pytorch_model.safetensors"]
