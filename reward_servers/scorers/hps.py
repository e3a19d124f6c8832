"""HPSv2.0 and HPSv2.1 (Wu et al. 2023, arXiv 2306.09341): cosine of a fine-tuned open_clip ViT, without logit scale.

Both releases are one architecture with different weights. The recipe is that of `score()` in the `hpsv2` package:
prompt -> ftfy, HTML-unescaped twice, spaces collapsed, lower case, BPE; image -> [0, 1] -> longer side resized by
antialiased bicubic, without clamp -> black bars to a square -> OpenAI mean and std; exact GELU. All in float32, as the
package computes on a CPU. On a GPU it lets autocast choose float16, which is the default there. Departures: the cosine
itself is never rounded to float16; the package fails on an image of which only the longer side has the model's size,
here that image gets its bars as well.

A model directory, written by `python -m reward_servers.convert hps`, holds

    config.json                    {"hps_version", "embed_dim", "vision_cfg", "text_cfg"}, the latter as open_clip's
    open_clip_model.safetensors    open_clip's state dict, in any float type
    vocab.json, merges.txt         CLIP's tokenizer

Context length, image size and vocabulary come from config.json, so smaller models of this family work as well.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, Self

import ftfy
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from common.errors import ModelError
from common.types import Precision
from common.weight_names import is_recomputed
from reward_servers.scorers.clip import ClipScorer, PromptTokens, load_clip_tokenizer
from reward_servers.scorers.model_directory import (
    CONFIG_FILE,
    State,
    load_state,
    read_settings,
    read_weights,
    require_directory,
)
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD, ImageRecipe
from reward_servers.scorers.processor import require_settings

WEIGHTS_FILE = "open_clip_model.safetensors"
MLP_RATIO = 4.0
PREPARED = {
    "mode": "RGB",
    "mean": OPENAI_MEAN,
    "std": OPENAI_STD,
    "interpolation": "bicubic",
    "resize_mode": "longest",
    "fill_color": 0,
}
"""This scorer's preparation of images, written with the keys of open_clip's preprocess_cfg."""
READ = {
    "vision_cfg": {"width", "layers", "head_width", "mlp_ratio", "patch_size", "image_size"},
    "text_cfg": {"width", "layers", "heads", "mlp_ratio", "vocab_size", "context_length"},
}
"""The keys of open_clip that are read."""
COMPUTED = {"vision_cfg.pool_type": "tok", "text_cfg.pool_type": "argmax", "vision_cfg.pos_embed_type": "learnable"}
"""The only values of these keys that are computed here. Of all other keys that are not read: none, or false."""
WITHOUT_EFFECT = {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}
UNUSED = ("timm_drop", "timm_pool", "timm_proj", "hf_pooler", "hf_proj", "hf_model_pretrained")
"""open_clip uses the keys that begin so only with a timm_model_name or an hf_model_name."""
WHOLE_MODEL = ("quick_gelu", "multimodal_cfg")
UNRELEASED = "unreleased"
"""This version stands for a model of this family, trained by others, whose config names no release."""


class HpsScorer(ClipScorer):
    """score = cosine(image, prompt), in [-1, 1]. `version` is the release: 2.0 or 2.1."""

    name = "hps"
    preprocess_version = "hpsv2-1"
    gpu_precision = Precision.FLOAT16

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        settings = read_settings(directory / CONFIG_FILE)
        try:
            tokenizer = load_clip_tokenizer(directory, settings["text_cfg"]["vocab_size"])
            config = clip_config(settings, tokenizer)
            require_settings(directory / CONFIG_FILE, settings.get("preprocess_cfg") or {}, PREPARED)
            recipe = ImageRecipe(settings["vision_cfg"]["image_size"], eight_bit=False, whole=True)
        except ValueError as error:
            raise ModelError(f"{directory / CONFIG_FILE} is not the config of an HPSv2 model: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{directory / CONFIG_FILE} is not an open_clip model config: {error!r}") from error
        model = CLIPModel(config)
        weights = directory / WEIGHTS_FILE
        load_state(model, from_open_clip(read_weights(weights), weights), weights)
        tokens = PromptTokens(tokenizer, config.text_config.max_position_embeddings, clean_text)
        scorer = cls(model, tokens, recipe, scale=1.0, device=device)
        scorer.version = str(settings.get("hps_version", UNRELEASED))
        return scorer


def clean_text(text: str) -> str:
    """The text cleaning of open_clip's tokenizer."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped).strip().lower()


def clip_config(settings: dict[str, Any], tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Convert an open_clip config to a transformers config; the ids of start and end come from the tokenizer."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    _require_supported(settings)
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": settings["embed_dim"]}
    return CLIPConfig(
        projection_dim=settings["embed_dim"],
        vision_config=shared
        | {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", MLP_RATIO)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config=shared
        | {
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", MLP_RATIO)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def _require_supported(settings: dict[str, Any]) -> None:
    """ValueError for a key of open_clip that changes what the model computes, except with the value computed here."""
    for name, read in READ.items():
        for key in sorted(read & settings[name].keys()):
            if not isinstance(settings[name][key], int | float):
                raise ValueError(f"{name}.{key} is {settings[name][key]!r}, but in models of HPSv2 it is a number")
    sections = {"": {key: settings.get(key) for key in WHOLE_MODEL}} | {
        f"{name}.": {key: value for key, value in settings[name].items() if key not in read | WITHOUT_EFFECT}
        for name, read in READ.items()
    }
    for section, found in sections.items():
        for key, value in found.items():
            if value and not key.startswith(UNUSED) and value != COMPUTED.get(section + key):
                raise ValueError(f"{section}{key} is {value!r}, which models of HPSv2 do not have")


def from_open_clip(state: State, source: Path) -> State:
    """Rename open_clip's tensors to CLIPModel's; ModelError on a missing or unknown one."""
    rest = dict(state)
    try:
        converted = {theirs: rest.pop(ours) for ours, theirs in _ONE_TO_ONE.items()}
        # open_clip multiplies by its projections from the right, nn.Linear from the left.
        converted["visual_projection.weight"] = rest.pop("visual.proj").T.contiguous()
        converted["text_projection.weight"] = rest.pop("text_projection").T.contiguous()
        for ours, theirs in (("visual.transformer.resblocks", "vision_model"), ("transformer.resblocks", "text_model")):
            for layer in sorted(_layers(rest, ours)):
                converted |= _convert_block(rest, f"{ours}.{layer}", f"{theirs}.encoder.layers.{layer}")
    except KeyError as error:
        raise ModelError(f"{source} has no tensor {error}: it is not a complete open_clip state dict") from error
    foreign = [name for name in rest if not is_recomputed(name)]
    if foreign:
        raise ModelError(f"{source} has {len(foreign)} tensors this architecture lacks, such as {min(foreign)!r}")
    return converted


_ONE_TO_ONE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_BLOCK_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _layers(state: State, prefix: str) -> set[str]:
    return {name.removeprefix(f"{prefix}.").split(".")[0] for name in state if name.startswith(f"{prefix}.")}


def _convert_block(state: State, ours: str, theirs: str) -> State:
    """Move one transformer block out of `state`; its fused q, k, v projection is split into three."""
    converted = {}
    for kind in ("weight", "bias"):
        fused = state.pop(f"{ours}.attn.in_proj_{kind}")
        for letter, part in zip("qkv", fused.chunk(3), strict=True):
            converted[f"{theirs}.self_attn.{letter}_proj.{kind}"] = part
        for our_part, their_part in _BLOCK_PARTS.items():
            converted[f"{theirs}.{their_part}.{kind}"] = state.pop(f"{ours}.{our_part}.{kind}")
    return converted
