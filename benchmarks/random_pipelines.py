"""Pipelines of the published transformers and VAEs with random weights, for measuring; their text encoders are shallow.

A text encoder of one thin layer has the published width, so everything behind it has its real size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

CLIP_TOKENS = 77
SD35_MEDIUM: dict[str, Any] = {
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
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD3_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_sd35_medium(directory: Path, layers: int) -> dict[str, Any]:
    """Save the pipeline, its transformer cut to `layers` blocks; returns the backbone section that loads it."""
    words = _tokenizer()
    config = SD35_MEDIUM | {"num_layers": layers}
    config["dual_attention_layers"] = tuple(index for index in config["dual_attention_layers"] if index < layers)
    StableDiffusion3Pipeline(
        transformer=in_bfloat16(lambda: SD3Transformer2DModel(**config)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=in_bfloat16(lambda: AutoencoderKL(**SD3_VAE)),
        text_encoder=in_bfloat16(lambda: _clip(768)),
        tokenizer=words,
        text_encoder_2=in_bfloat16(lambda: _clip(1280)),
        tokenizer_2=words,
        text_encoder_3=in_bfloat16(
            lambda: T5EncoderModel(
                T5Config(vocab_size=len(words), d_model=4096, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
            )
        ),
        tokenizer_3=words,
    ).save_pretrained(directory)
    return {"family": "sd3", "path": directory, "guidance_scale": 4.5, "max_sequence_length": 256}


def write_klein_4b(directory: Path, layers: int) -> dict[str, Any]:
    """As `write_sd35_medium`, `layers` of each kind of block; the teacher has a base of its own, of equal weights."""
    words = _tokenizer()
    config = KLEIN_4B | {"num_layers": min(layers, KLEIN_4B["num_layers"]), "num_single_layers": layers}
    Flux2KleinPipeline(
        transformer=in_bfloat16(lambda: Flux2Transformer2DModel(**config)),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"),
        vae=in_bfloat16(AutoencoderKLFlux2),
        text_encoder=in_bfloat16(
            lambda: Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(words),
                    hidden_size=2560,
                    intermediate_size=8,
                    num_hidden_layers=3,
                    num_attention_heads=1,
                    num_key_value_heads=1,
                    head_dim=8,
                )
            )
        ),
        tokenizer=words,
        is_distilled=False,
    ).save_pretrained(directory)
    text = {"text_encoder_layers": (1, 2, 3), "max_sequence_length": 512}
    return {"family": "flux2", "path": directory, "teacher_path": directory, "guidance_scale": 4.0, **text}


MODELS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
    # How it is written, and how many blocks (of klein: single-stream ones) the published model has.
    "sd35_medium": (write_sd35_medium, 24),
    "flux2_klein_4b": (write_klein_4b, 20),
}


def in_bfloat16(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """In bfloat16 from the start: four billion float32 weights would not need to exist."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def _clip(width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(_tokenizer()),
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            projection_dim=width,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<start>", "<end>", "<unk>", "red", "circle"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template=CHAT,
        model_max_length=CLIP_TOKENS,
    )
