"""Data that published checkpoints lack: their architectures, and transformers' names for their tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from common.errors import ModelError
from common.weight_names import is_recomputed
from reward_servers.scorers.model_directory import State

# HPSv2.0 and 2.1 are fine-tuned from open_clip's ViT-H-14 (laion2B-s32B-b79K); this is open_clip's own config for it.
HPS_SETTINGS: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}

# BLIP's "large" ViT (Li et al. 2022, arXiv 2201.12086), with timm's layer norms, and BERT-base with cross attention.
IMAGE_REWARD_SETTINGS: dict[str, Any] = {
    "image_reward_version": "1.0",
    "context_length": 35,
    "vision": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": 30524,
        "max_position_embeddings": 512,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-12,
    },
}
IMAGE_REWARD_MEAN = 0.16717362830052426
IMAGE_REWARD_STD = 1.0333394966054072
"""Mean and standard deviation of the raw ratings are constants in ImageReward's published code, not in its file."""

_VISION = "vision_model."
_VISION_LAYER = rf"{_VISION}encoder.layers.\1."
_IMAGE_REWARD_NAMES = [
    (r"blip\.visual_encoder\.cls_token", rf"{_VISION}embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", rf"{_VISION}embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(weight|bias)", rf"{_VISION}embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(weight|bias)", rf"{_VISION}post_layernorm.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(weight|bias)", rf"{_VISION_LAYER}layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", rf"{_VISION_LAYER}self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(weight|bias)", rf"{_VISION_LAYER}self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", rf"{_VISION_LAYER}mlp.\2.\3"),
    (r"blip\.text_encoder\.((?:embeddings|encoder)\..+)", r"text_model.\1"),
    (r"mlp\.(layers\.\d\.(?:weight|bias))", r"head.\1"),
]
# BLIP's contrastive projections, which the reward does not use.
_IMAGE_REWARD_UNUSED = r"blip\.(?:vision_proj|text_proj)\..+"


def image_reward_state(published: State, source: Path) -> State:
    """Rename the tensors of ImageReward.pt to those of `ImageRewardModel`; ModelError on an unknown tensor.

    Loading the model finds missing tensors.
    """
    state = {
        _rename(name, source): tensor
        for name, tensor in published.items()
        if re.fullmatch(_IMAGE_REWARD_UNUSED, name) is None and not is_recomputed(name)
    }
    constants = {"reward_mean": IMAGE_REWARD_MEAN, "reward_std": IMAGE_REWARD_STD}
    return state | {name: torch.tensor(value) for name, value in constants.items()}


def _rename(name: str, source: Path) -> str:
    for pattern, replacement in _IMAGE_REWARD_NAMES:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(replacement)
    raise ModelError(f"{source} is not an ImageReward checkpoint: it holds a tensor named {name!r}")
