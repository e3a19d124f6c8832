"""The two preference models of the shapes world: their sizes and their files.

Both are CLIP models (arXiv 2103.00020) with the exact GELU, trained by `zoo.preference.training` as
`transformers.CLIPModel`s. The HPS one is stored under open_clip's names, as HPSv2.1 is published; the PickScore one as
a `CLIPModel` directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_servers.scorers.hps import clip_config
from zoo.half_weights import save_half
from zoo.world.scenes import CANVAS
from zoo.world.tokenizers import MAX_TOKENS, clip_tokenizer, write_clip_vocabulary

PATCH_SIZE = 8
HPS_SIZES = {"embed_dim": 96, "vision": (96, 4, 32), "text": (64, 2, 2)}
PICKSCORE_SIZES = {"embed_dim": 80, "vision": (80, 5, 20), "text": (80, 2, 4)}
"""Vision: width, layers, width of a head. Text: width, layers, heads."""


def open_clip_settings(sizes: dict[str, Any], vocabulary_size: int) -> dict[str, Any]:
    """A model's sizes in the form of open_clip's config.json."""
    width, layers, head_width = sizes["vision"]
    text_width, text_layers, heads = sizes["text"]
    vision = {"image_size": CANVAS, "layers": layers, "width": width, "head_width": head_width}
    vision["patch_size"] = PATCH_SIZE
    text = {"context_length": MAX_TOKENS, "vocab_size": vocabulary_size, "width": text_width, "heads": heads}
    return {"embed_dim": sizes["embed_dim"], "vision_cfg": vision, "text_cfg": {**text, "layers": text_layers}}


def new_model(sizes: dict[str, Any], directory: Path) -> tuple[CLIPModel, Any]:
    """A new model and its tokenizer, whose vocabulary is written into `directory`."""
    tokenizer = clip_tokenizer(directory)
    config: CLIPConfig = clip_config(open_clip_settings(sizes, len(tokenizer)), tokenizer)
    model = CLIPModel(config)
    vision, text = model.vision_model.embeddings, model.text_model.embeddings
    side = CANVAS // PATCH_SIZE
    with torch.no_grad():
        rows = _waves(side, config.vision_config.hidden_size // 2, 16.0)
        grid = torch.cat([rows[:, None].expand(-1, side, -1), rows[None].expand(side, -1, -1)], -1)
        vision.position_embedding.weight[1:] = 0.5 * grid.reshape(side * side, -1)
        text.position_embedding.weight.copy_(0.03 * _waves(MAX_TOKENS, config.text_config.hidden_size, 60.0))
    return model, tokenizer


def _waves(count: int, width: int, longest: float) -> Tensor:
    """Sines and cosines of positions, [count, width]: an initialisation with which neighbours are easy to find."""
    frequencies = longest ** -torch.linspace(0, 1, width // 2)
    angles = torch.arange(count)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], 1)


def save_pickscore(model: CLIPModel, directory: Path) -> None:
    """Write a `CLIPModel` directory with float16 weights and the tokenizer's vocabulary."""
    write_clip_vocabulary(directory)
    model.config.save_pretrained(directory)
    save_half(model.state_dict(), directory / "model.safetensors")


def save_hps(model: CLIPModel, sizes: dict[str, Any], directory: Path) -> None:
    """Write an open_clip directory with float16 weights and the tokenizer's vocabulary."""
    write_clip_vocabulary(directory)
    settings = open_clip_settings(sizes, model.config.text_config.vocab_size)
    (directory / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_half(to_open_clip(model.state_dict()), directory / "open_clip_model.safetensors")


# --- transformers' names -> open_clip's ----------------------------------------------------------------------------

_EMBEDDINGS = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
_BLOCKS = {
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
}
_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `CLIPModel` state dict to open_clip's keys, fusing q, k and v and transposing the projections.

    Raises:
        KeyError: the state dict has a tensor without a counterpart in open_clip.
    """
    converted = {
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    for name, value in state.items():
        owner, _, kind = name.rpartition(".")
        if name.endswith(("_projection.weight", "position_ids")) or ".k_proj." in name or ".v_proj." in name:
            continue
        if name in _EMBEDDINGS:
            converted[_EMBEDDINGS[name]] = value
        elif owner in _EMBEDDINGS:
            converted[f"{_EMBEDDINGS[owner]}.{kind}"] = value
        else:
            block, part = _split_block(owner)
            if part == "self_attn.q_proj":
                fused = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(fused)
            else:
                converted[f"{block}.{_PARTS[part]}.{kind}"] = value
    return converted


def _split_block(owner: str) -> tuple[str, str]:
    """`vision_model.encoder.layers.3.mlp.fc1` -> (`visual.transformer.resblocks.3`, `mlp.fc1`)."""
    for theirs, ours in _BLOCKS.items():
        if owner.startswith(f"{theirs}."):
            index, _, part = owner.removeprefix(f"{theirs}.").partition(".")
            return f"{ours}.{index}", part
    raise KeyError(f"open_clip has no place for {owner!r}")
