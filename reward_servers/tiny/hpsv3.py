"""Tiny random model of HPSv3, in the published format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Shape of the published ones: {text_prompt} in one, the reward token in the other. The words are ours.
HPSV3_PROMPT = {
    "instruction": "\nRate the image.  \nPrompt - {text_prompt}\n\n\n",
    "request": "\nThe rating: <|Reward|>\n\nEND\n",
}
HPSV3_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_SPECIAL = 256
HPSV3_TOKENS = FIRST_SPECIAL + len(HPSV3_SPECIAL) + 1
HPSV3_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    # As published: more rows than tokens. Training cut the weights, and nobody changed the config.
    "vocab_size": HPSV3_TOKENS + 100,
    "bos_token_id": FIRST_SPECIAL,
    "eos_token_id": FIRST_SPECIAL + 2,
    "vision_start_token_id": FIRST_SPECIAL + 3,
    "vision_end_token_id": FIRST_SPECIAL + 4,
    "vision_token_id": FIRST_SPECIAL + 5,
    "image_token_id": FIRST_SPECIAL + 6,
    "video_token_id": FIRST_SPECIAL + 7,
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}


def hpsv3_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict with the names and the layout of the published file (transformers 4.45)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.15

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}

    state = {
        "visual.patch_embed.proj.weight": draw(32, 3, 2, 14, 14),
        "model.embed_tokens.weight": draw(HPSV3_TOKENS, 32) * 3,
        "model.norm.weight": 1 + draw(32),
        "lm_head.weight": draw(HPSV3_TOKENS, 32),
    }
    for layer in range(2):
        block = f"visual.blocks.{layer}"
        state |= norm(f"{block}.norm1", 32) | norm(f"{block}.norm2", 32)
        state |= linear(f"{block}.attn.qkv", 96, 32) | linear(f"{block}.attn.proj", 32, 32)
        state |= linear(f"{block}.mlp.fc1", 64, 32) | linear(f"{block}.mlp.fc2", 32, 64)
        block = f"model.layers.{layer}"
        for name, outputs in (("q", 32), ("k", 16), ("v", 16)):
            state |= linear(f"{block}.self_attn.{name}_proj", outputs, 32)
        state[f"{block}.self_attn.o_proj.weight"] = draw(32, 32)
        for name, outputs, inputs in (("gate", 48, 32), ("up", 48, 32), ("down", 32, 48)):
            state[f"{block}.mlp.{name}_proj.weight"] = draw(outputs, inputs)
        state[f"{block}.input_layernorm.weight"] = 1 + draw(32)
        state[f"{block}.post_attention_layernorm.weight"] = 1 + draw(32)
    state |= norm("visual.merger.ln_q", 32)
    state |= linear("visual.merger.mlp.0", 128, 128) | linear("visual.merger.mlp.2", 32, 128)
    return state | linear("rm_head.0", 1024, 32) | linear("rm_head.3", 16, 1024) | linear("rm_head.5", 2, 16)


def write_hpsv3(directory: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(HPSV3_CONFIG))
    (directory / "prompt.json").write_text(json.dumps(HPSV3_PROMPT))
    save_file(hpsv3_state() if state is None else state, directory / "HPSv3.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(HPSV3_SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
