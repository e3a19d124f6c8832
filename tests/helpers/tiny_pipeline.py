"""A random `StableDiffusion3Pipeline` of a few kilobytes, whole in every part, that knows nothing of the zoo."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from common.backbones.base import Backbone
from common.backbones.sd3 import StableDiffusion3
from common.config.backbones import Sd3Backbone
from common.config.run import LoraConfig
from tests.helpers.tiny_rewards import write_tokenizer

CLIP_TOKENS = 12
T5_TOKENS = 10
IMAGE_SIDE = 16
LATENT_SIDE = 8
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

UNUSED_MODULE = "transformer_blocks.1.attn.add_q_proj"
"""The last block drops what its text tokens become, so what makes their queries never has a gradient."""


def write_tiny_pipeline(directory: Path, seed: int = 0, *, dual_attention: tuple[int, ...] = ()) -> Path:
    """Save the pipeline into `directory`; every weight is a function of `seed`.

    SD3.5-M has blocks with a second attention, of the image tokens alone; SD3-M and SD3.5-L have none.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokens = clip_tokenizer(directory / "clip_vocabulary")
        t5_tokens = t5_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(dual_attention),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=_clip(clip_tokens),
            tokenizer=clip_tokens,
            text_encoder_2=_clip(clip_tokens),
            tokenizer_2=clip_tokens,
            text_encoder_3=t5_encoder(t5_tokens),
            tokenizer_3=t5_tokens,
        )
        pipeline.save_pretrained(directory)
    return directory


def load_tiny_backbone(
    directory: Path, lora: LoraConfig | None = None, *, sharded: bool = False, **changes: object
) -> StableDiffusion3:
    """A backbone of its own on the saved pipeline, as learner and worker load it."""
    values = {"path": directory, "max_sequence_length": T5_TOKENS, "dtype": "float32", "guidance_scale": 3.0}
    settings = Sd3Backbone.model_validate(values | changes)
    return StableDiffusion3(settings, lora or tiny_lora(), torch.device("cpu"), sharded=sharded)


def tiny_lora(targets: tuple[str, ...] = TARGETS) -> LoraConfig:
    return LoraConfig(rank=2, alpha=4, targets=targets)


def randomise(backbone: Backbone, adapter: str, seed: int, scale: float = 0.1) -> None:
    """Give an adapter weights that change something: freshly added, its B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.adapters.parameters(adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _transformer(dual_attention: tuple[int, ...]) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=LATENT_SIDE // 2,
        qk_norm="rms_norm",
        dual_attention_layers=dual_attention,
    )
    for parameter in model.parameters():
        # The default initialisation of so small a network hardly listens to its prompt.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=IMAGE_SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def clip_tokenizer(directory: Path) -> CLIPTokenizer:
    directory.mkdir(parents=True)
    write_tokenizer(directory)
    return CLIPTokenizer.from_pretrained(directory, model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789<>/|,.'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=T5_TOKENS,
    )
