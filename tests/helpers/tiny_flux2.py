"""Random FLUX.2 pipelines of a few kilobytes, whole in every part, that know nothing of the zoo."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.backbones.flux2 import Flux2
from common.config.backbones import Flux2Backbone
from common.config.run import LoraConfig

TEXT_TOKENS = 48
TEXT_LAYERS = (1, 2, 3)
"""Of the text encoder's four."""
TEXT_WIDTH = 16
HEIGHT, WIDTH = 16, 24
TOKEN_PIXELS = 4
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEV_CHAT = (
    "{% for message in messages if message['role'] == 'user' %}<|im_start|>"
    "{% for content in message['content'] %}{{ content['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)
"""Without the system message, which is longer than all the tokens here."""
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
"""As in the published pipelines of FLUX.1 and FLUX.2."""


def write_tiny_klein(directory: Path, seed: int = 0, *, distilled: bool = False) -> Path:
    """Save the pipeline into `directory`; every weight is a function of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        Flux2KleinPipeline(
            transformer=flux2_transformer(guidance=False),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=flux2_autoencoder(),
            text_encoder=_qwen(tokenizer),
            tokenizer=tokenizer,
            is_distilled=distilled,
        ).save_pretrained(directory)
    return directory


def write_tiny_dev(directory: Path, seed: int = 0) -> Flux2Pipeline:
    """Save a `Flux2Pipeline`, whose published tokenizer is a processor, and give it as it is in memory."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        tokenizer.chat_template = DEV_CHAT
        pipeline = Flux2Pipeline(
            transformer=flux2_transformer(guidance=True),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=flux2_autoencoder(),
            text_encoder=_mistral(tokenizer),
            tokenizer=tokenizer,
        )
    pipeline.save_pretrained(directory)
    index = json.loads((directory / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (directory / "model_index.json").write_text(json.dumps(index))
    return pipeline


def load_tiny_klein(directory: Path, teacher: Path | None = None, **changes: object) -> Flux2:
    return Flux2(klein_settings(directory, teacher, **changes), LoraConfig(rank=2, alpha=4), torch.device("cpu"))


def klein_settings(directory: Path, teacher: Path | None = None, **changes: object) -> Flux2Backbone:
    values = {
        "family": "flux2",
        "path": directory,
        "teacher_path": teacher,
        "height": HEIGHT,
        "width": WIDTH,
        "max_sequence_length": TEXT_TOKENS,
        "text_encoder_layers": TEXT_LAYERS,
        "dtype": "float32",
        "guidance_scale": 3.0,
    }
    return Flux2Backbone.model_validate(values | changes)


def flux2_transformer(*, guidance: bool) -> Flux2Transformer2DModel:
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH * len(TEXT_LAYERS),
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    listen(model)
    return model


def listen(model: torch.nn.Module) -> None:
    """The default initialisation of so small a network hardly listens to its prompt."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=16,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def qwen_tokenizer() -> Qwen2TokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: PreTrainedTokenizerFast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=special[1:3],
        model_max_length=TEXT_TOKENS,
    )
    fast.add_tokens(["<think>"])
    fast.chat_template = CHAT
    return fast


def _qwen(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=TEXT_TOKENS,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _mistral(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": TEXT_TOKENS,
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
