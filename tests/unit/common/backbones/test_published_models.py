"""The full-size transformers, built without memory, against what is published of their weights.

Bytes: the sum in FLUX.1-dev's index of shards; of the others the published single files, which hold the same tensors in
another layout (SD3's the VAE too), less a header of at most 200 000 bytes. No size is known of SD3.5-M, FLUX.2-klein-9B
and FLUX.2-dev.
Shapes: FLUX.2-klein's and FLUX.1's as their files' headers and indices list them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)

from common.backbones.files.pipeline_files import PipelineFiles
from common.backbones.pipeline_loading import ignored_option

SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_LARGE = SD3_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM = SD3_MEDIUM | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD3_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = KLEIN_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
FLUX1 = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
KLEIN_DEFAULTS = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "attention_head_dim": 128,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "eps": 1e-6,
}
VAE_DEFAULTS = {
    "act_fn": "silu",
    "force_upcast": True,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 1024,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
SCALED_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": None, "latents_std": None}
FLUX2_VAE = {"latent_channels": 32, "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "patch_size": (2, 2)}
LARGEST_HEADER = 200_000
Shapes = dict[str, tuple[int, ...]]


def shapes(model: type[Any], config: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        built = model(**config)
    return {name: tuple(value.shape) for name, value in built.state_dict().items()}


def size(found: Shapes) -> int:
    """Bytes in bfloat16."""
    return sum(2 * int(torch.Size(shape).numel()) for shape in found.values())


@pytest.mark.parametrize(
    ("config", "published"), [(SD3_MEDIUM, 4_337_667_306), (SD35_LARGE, 16_460_379_262)], ids=["sd3m", "sd35l"]
)
def test_sd3_has_the_published_size(config: dict[str, Any], published: int) -> None:
    both = size(shapes(SD3Transformer2DModel, config)) + size(shapes(AutoencoderKL, SD3_VAE))
    assert 0 < published - both < LARGEST_HEADER


def test_sd35_medium_has_a_second_attention_in_its_first_thirteen_blocks() -> None:
    found = shapes(SD3Transformer2DModel, SD35_MEDIUM)
    second = {int(name.split(".")[1]) for name in found if ".attn2." in name}
    assert second == set(range(13))
    assert found["pos_embed.pos_embed"] == (1, 384 * 384, 1536)
    assert found["transformer_blocks.0.norm1.linear.weight"] == (9 * 1536, 1536)
    assert found["transformer_blocks.13.norm1.linear.weight"] == (6 * 1536, 1536)


def klein_shapes(hidden: int, context: int, double_blocks: int, single_blocks: int) -> Shapes:
    """Of every tensor, by name: heads are 128 wide, feed-forwards 3 times the hidden width, gated, without biases."""
    found: Shapes = {
        "x_embedder.weight": (hidden, 128),
        "context_embedder.weight": (hidden, context),
        "time_guidance_embed.timestep_embedder.linear_1.weight": (hidden, 256),
        "time_guidance_embed.timestep_embedder.linear_2.weight": (hidden, hidden),
        "double_stream_modulation_img.linear.weight": (6 * hidden, hidden),
        "double_stream_modulation_txt.linear.weight": (6 * hidden, hidden),
        "single_stream_modulation.linear.weight": (3 * hidden, hidden),
        "norm_out.linear.weight": (2 * hidden, hidden),
        "proj_out.weight": (128, hidden),
    }
    square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for block in range(double_blocks):
        prefix = f"transformer_blocks.{block}"
        found |= {f"{prefix}.attn.{name}.weight": (hidden, hidden) for name in square}
        found |= {f"{prefix}.attn.norm_{name}.weight": (128,) for name in ("q", "k", "added_q", "added_k")}
        for feed_forward in ("ff", "ff_context"):
            found[f"{prefix}.{feed_forward}.linear_in.weight"] = (6 * hidden, hidden)
            found[f"{prefix}.{feed_forward}.linear_out.weight"] = (hidden, 3 * hidden)
    for block in range(single_blocks):
        prefix = f"single_transformer_blocks.{block}.attn"
        found[f"{prefix}.to_qkv_mlp_proj.weight"] = (9 * hidden, hidden)
        found[f"{prefix}.to_out.weight"] = (hidden, 4 * hidden)
        found |= {f"{prefix}.norm_{name}.weight": (128,) for name in ("q", "k")}
    return found


def test_klein_has_the_published_tensors() -> None:
    small, large = (shapes(Flux2Transformer2DModel, config) for config in (KLEIN_4B, KLEIN_9B))
    assert small == klein_shapes(hidden=3072, context=7680, double_blocks=5, single_blocks=20)
    assert large == klein_shapes(hidden=4096, context=12288, double_blocks=8, single_blocks=24)
    assert 0 < 7_751_105_712 - size(small) < LARGEST_HEADER


def test_flux1_has_the_published_tensors() -> None:
    found = shapes(FluxTransformer2DModel, {"guidance_embeds": True})
    assert size(found) == 23_802_816_640
    first = "single_transformer_blocks.0."
    single = {name.removeprefix(first) for name in found if name.startswith(first)}
    linear = ("attn.to_q", "attn.to_k", "attn.to_v", "norm.linear", "proj_mlp", "proj_out")
    assert single == {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} | {
        "attn.norm_q.weight",
        "attn.norm_k.weight",
    }


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (SD3Transformer2DModel, SD3_MEDIUM),
        (SD3Transformer2DModel, SD35_MEDIUM),
        (SD3Transformer2DModel, SD35_LARGE | {"dual_attention_layers": ()}),
        (FluxTransformer2DModel, FLUX1),
        (Flux2Transformer2DModel, KLEIN_4B | KLEIN_DEFAULTS),
        (Flux2Transformer2DModel, KLEIN_9B | KLEIN_DEFAULTS),
        (AutoencoderKL, SD3_VAE | VAE_DEFAULTS | SCALED_VAE),
        (AutoencoderKLFlux2, SD3_VAE | VAE_DEFAULTS | FLUX2_VAE),
    ],
)
def test_no_published_configuration_has_an_option_that_its_class_ignores(
    tmp_path: Path, kind: type[Any], config: dict[str, Any]
) -> None:
    """Of FLUX.2's VAE it has one, `force_upcast`, which changes nothing."""
    files = PipelineFiles(tmp_path, tmp_path, "", {}, ("part",))
    (tmp_path / "part").mkdir()
    saved = config | {"_class_name": kind.__name__, "_diffusers_version": "0.30.0", "_name_or_path": "../checkpoints"}
    (tmp_path / "part" / "config.json").write_text(json.dumps(saved))
    assert ignored_option(files, "part", kind) is None
    (tmp_path / "part" / "config.json").write_text(json.dumps(saved | {"qk_norm_eps": 0.1}))
    assert "its part/config.json has qk_norm_eps = 0.1" in str(ignored_option(files, "part", kind))
