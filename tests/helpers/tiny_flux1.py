"""A random `FluxPipeline` of a few kilobytes, whole in every part, that knows nothing of the zoo."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.backbones.flux1 import Flux1
from common.config.backbones import Flux1Backbone
from common.config.run import LoraConfig
from tests.helpers.tiny_flux2 import SCHEDULER, listen
from tests.helpers.tiny_pipeline import CLIP_TOKENS, T5_TOKENS, autoencoder, clip_tokenizer, t5_encoder, t5_tokenizer

HEIGHT, WIDTH = 16, 24


def write_tiny_flux1(directory: Path, seed: int = 0, *, guidance: bool = True) -> Path:
    """Save the pipeline into `directory`; every weight is a function of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokens, t5_tokens = clip_tokenizer(directory / "clip_vocabulary"), t5_tokenizer()
        FluxPipeline(
            transformer=_transformer(guidance=guidance),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=autoencoder(),
            text_encoder=_clip(clip_tokens),
            tokenizer=clip_tokens,
            text_encoder_2=t5_encoder(t5_tokens),
            tokenizer_2=t5_tokens,
        ).save_pretrained(directory)
    return directory


def load_tiny_flux1(directory: Path, **changes: object) -> Flux1:
    values = {
        "family": "flux1",
        "path": directory,
        "height": HEIGHT,
        "width": WIDTH,
        "max_sequence_length": T5_TOKENS,
        "dtype": "float32",
        "guidance_scale": 3.0,
        "student_guidance": 1.5,
    }
    settings = Flux1Backbone.model_validate(values | changes)
    return Flux1(settings, LoraConfig(rank=2, alpha=4), torch.device("cpu"))


def _transformer(*, guidance: bool) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    listen(model)
    return model


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
