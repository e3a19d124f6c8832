"""Tiny random reward models in the published formats, and scorers that misbehave on request."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel

from common.reward_api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.base import Scorer

CONTEXT = 16
IMAGE_SIZE = 32
END_TOKEN = 513
VOCABULARY = 514
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


def hps_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random open_clip state dict for HPS_SETTINGS."""
    vision, text = HPS_SETTINGS["vision_cfg"], HPS_SETTINGS["text_cfg"]
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
        "visual.proj": draw(vision["width"], HPS_SETTINGS["embed_dim"]),
        "token_embedding.weight": draw(text["vocab_size"], text["width"]),
        "positional_embedding": draw(text["context_length"], text["width"]),
        "text_projection": draw(text["width"], HPS_SETTINGS["embed_dim"]),
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
    torch.manual_seed(1)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": end_token}
    model = CLIPModel(
        CLIPConfig(
            projection_dim=24,
            vision_config=tower | {"image_size": IMAGE_SIZE, "patch_size": 8},
            text_config=tower | text | {"bos_token_id": VOCABULARY - 2, "pad_token_id": END_TOKEN},
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 0:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def random_images(count: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, seed: int = 0) -> ByteArray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


class BrightnessScorer(Scorer):
    """Mean pixel value in [0, 1]; the gradient is known by hand."""

    name = "brightness"
    score_range = (0.0, 1.0)
    differentiable = True
    weights_hash = "none"

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        return cls()

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        return (images_BHWC.mean(axis=(1, 2, 3)) / 255).astype(np.float32)

    def score_with_gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        gradients = np.full_like(images_BCHW, 1 / images_BCHW[0].size)
        return images_BCHW.mean(axis=(1, 2, 3)), gradients


class MischiefScorer(BrightnessScorer):
    """Does what the first prompt of its batch says: nan, count, range, raise, or wait for metadata["until"]."""

    name = "mischief"
    differentiable = False

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        scores_B = super().score(images_BHWC, prompts, metadata)
        if prompts[0] == "raise":
            raise RuntimeError("asked to fail")
        if prompts[0] == "wait":
            Path(metadata[0]["started"]).touch()
            deadline = time.monotonic() + 30
            while not Path(metadata[0]["until"]).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        wrong = {"nan": np.where(np.arange(len(prompts)) == 0, np.nan, scores_B), "count": scores_B[:-1]}
        return wrong.get(prompts[0], scores_B + 100 if prompts[0] == "range" else scores_B)


class SickScorer(MischiefScorer):
    """Fails its probe."""

    probe_prompt = "nan"
