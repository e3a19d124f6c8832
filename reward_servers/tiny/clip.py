"""Tiny random models of HPS and of CLIP, for `hps`, `pickscore` and `clipscore`, in the published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

CONTEXT = 16
IMAGE_SIZE = 32
END_TOKEN = 513
VOCABULARY = 514
CLIP_FEATURES = 24
HPS_SETTINGS: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2},
}


def write_tokenizer(directory: Path) -> None:
    """CLIP's byte-level tokenizer without merges: every character is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def hps_state(seed: int = 0, settings: dict[str, Any] = HPS_SETTINGS) -> dict[str, torch.Tensor]:
    """A random open_clip state dict of the architecture `settings`."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}

    def block(name: str, width: int) -> dict[str, torch.Tensor]:
        fused = {f"{name}.attn.in_proj_weight": draw(3 * width, width), f"{name}.attn.in_proj_bias": draw(3 * width)}
        return (
            fused
            | linear(f"{name}.attn.out_proj", width, width)
            | linear(f"{name}.mlp.c_fc", 4 * width, width)
            | linear(f"{name}.mlp.c_proj", width, 4 * width)
            | norm(f"{name}.ln_1", width)
            | norm(f"{name}.ln_2", width)
        )

    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    state = {
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": draw(vision["width"]),
        "visual.positional_embedding": draw(patches + 1, vision["width"]),
        "visual.conv1.weight": draw(vision["width"], 3, vision["patch_size"], vision["patch_size"]),
        "visual.proj": draw(vision["width"], settings["embed_dim"]),
        "token_embedding.weight": draw(text["vocab_size"], text["width"]),
        "positional_embedding": draw(text["context_length"], text["width"]),
        "text_projection": draw(text["width"], settings["embed_dim"]),
    }
    state |= norm("visual.ln_pre", vision["width"]) | norm("visual.ln_post", vision["width"])
    state |= norm("ln_final", text["width"])
    for layer in range(vision["layers"]):
        state |= block(f"visual.transformer.resblocks.{layer}", vision["width"])
    for layer in range(text["layers"]):
        state |= block(f"transformer.resblocks.{layer}", text["width"])
    return state


def write_hps(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(HPS_SETTINGS))
    state = {name: tensor.to(dtype) for name, tensor in hps_state().items()}
    save_file(state, directory / "open_clip_model.safetensors")
    write_tokenizer(directory)
    return directory


def write_pickscore(directory: Path, end_token: int = END_TOKEN) -> Path:
    """A transformers CLIPModel; `clipscore` loads it as well, and `aesthetic` is converted from it."""
    torch.manual_seed(1)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": end_token}
    model = CLIPModel(
        CLIPConfig(
            projection_dim=CLIP_FEATURES,
            vision_config=tower | {"image_size": IMAGE_SIZE, "patch_size": 8},
            text_config=tower | text | {"bos_token_id": VOCABULARY - 2, "pad_token_id": END_TOKEN},
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 0:
            torch.nn.init.normal_(parameter, std=0.2)
    save_quietly(model, directory)
    write_tokenizer(directory)
    return directory


def save_quietly(model: PreTrainedModel, directory: Path) -> None:
    """Save a model without transformers' progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
