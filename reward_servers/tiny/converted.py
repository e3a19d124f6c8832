"""Tiny random checkpoints of `aesthetic` and `image_reward` as they are published, and the directories made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reward_servers.convert import convert_aesthetic, convert_image_reward
from reward_servers.tiny.clip import CLIP_FEATURES, IMAGE_SIZE, write_pickscore

BERT_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BERT_WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", ",", "-", "京"),
    *BERT_LETTERS,
    *(f"##{letter}" for letter in BERT_LETTERS),
)
IMAGE_REWARD_SETTINGS: dict[str, Any] = {
    "image_reward_version": "tiny",
    "context_length": 12,
    "vision": {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": len(BERT_WORDS) + 2,
        "max_position_embeddings": 16,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
    },
}


def published_head(features: int, seed: int = 2) -> dict[str, torch.Tensor]:
    """A random head with the names of sac+logos+ava1-l14-linearMSE.pth."""
    generator = torch.Generator().manual_seed(seed)
    widths = [features, 1024, 128, 64, 16, 1]
    head = {}
    for name, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        head[f"layers.{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        head[f"layers.{name}.bias"] = torch.randn(outputs, generator=generator) * 0.2
    return head


def published_image_reward(seed: int = 3) -> dict[str, torch.Tensor]:
    """A random state dict with the names of ImageReward.pt, for IMAGE_REWARD_SETTINGS."""
    vision, text = IMAGE_REWARD_SETTINGS["vision"], IMAGE_REWARD_SETTINGS["text"]
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator) * 0.2

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        linear(name, width, 1)
        state[f"{name}.weight"] = 1 + state[f"{name}.weight"][:, 0]

    width, patch = vision["hidden_size"], vision["patch_size"]
    draw("blip.visual_encoder.cls_token", 1, 1, width)
    draw("blip.visual_encoder.pos_embed", 1, (vision["image_size"] // patch) ** 2 + 1, width)
    draw("blip.visual_encoder.patch_embed.proj.weight", width, 3, patch, patch)
    draw("blip.visual_encoder.patch_embed.proj.bias", width)
    for layer in range(vision["num_hidden_layers"]):
        block = f"blip.visual_encoder.blocks.{layer}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", vision["intermediate_size"], width)
        linear(f"{block}.mlp.fc2", width, vision["intermediate_size"])
    norm("blip.visual_encoder.norm", width)

    words = text["hidden_size"]
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(text["max_position_embeddings"])[None]
    draw("blip.text_encoder.embeddings.word_embeddings.weight", text["vocab_size"], words)
    draw("blip.text_encoder.embeddings.position_embeddings.weight", text["max_position_embeddings"], words)
    norm("blip.text_encoder.embeddings.LayerNorm", words)
    for layer in range(text["num_hidden_layers"]):
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for attention, source in (("attention", words), ("crossattention", width)):
            linear(f"{block}.{attention}.self.query", words, words)
            linear(f"{block}.{attention}.self.key", words, source)
            linear(f"{block}.{attention}.self.value", words, source)
            linear(f"{block}.{attention}.output.dense", words, words)
            norm(f"{block}.{attention}.output.LayerNorm", words)
        linear(f"{block}.intermediate.dense", text["intermediate_size"], words)
        linear(f"{block}.output.dense", words, text["intermediate_size"])
        norm(f"{block}.output.LayerNorm", words)
    linear("blip.vision_proj", 8, width)
    linear("blip.text_proj", 8, words)
    return state | {f"mlp.{name}": tensor for name, tensor in published_head(words).items()}


def write_bert_vocabulary(directory: Path) -> Path:
    """A vocab.txt of BERT's format: special tokens, brackets, single letters and their continuations."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n", encoding="utf-8")
    return directory


def write_aesthetic(directory: Path, work: Path) -> Path:
    """Made by the real conversion, from a published-format head and a tiny CLIP."""
    clip, head = write_pickscore(work / "clip"), work / "head.pth"
    torch.save(published_head(CLIP_FEATURES), head)
    convert_aesthetic(head, directory, clip)
    return directory


def write_image_reward(directory: Path, work: Path) -> Path:
    """Made by the real conversion, from a published-format checkpoint."""
    checkpoint = work / "ImageReward.pt"
    torch.save(published_image_reward(), checkpoint)
    convert_image_reward(checkpoint, directory, write_bert_vocabulary(work / "bert"), IMAGE_REWARD_SETTINGS)
    return directory
