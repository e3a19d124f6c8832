"""Stable Diffusion 3 and 3.5: a diffusers `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import DiffusersBackbone, image_sides, require_vae, vae_factor
from common.backbones.files.pipeline_files import PipelineFiles
from common.backbones.files.schedules import linear_mu_of, pipeline_sigmas, scheduler_config
from common.backbones.files.tokenizer_files import clip_tokens
from common.backbones.plain_text import make_special_tokens_plain_text
from common.config.backbones import Sd3Backbone
from common.errors import ModelError
from common.types import Guidance

TIMESTEP_SCALE = 1000.0
"""SD3's transformer counts noise levels from 0 to 1000."""
CLIP_ENCODERS = ("text_encoder", "text_encoder_2")


class StableDiffusion3(DiffusersBackbone[Sd3Backbone]):
    """SD3-M, SD3.5-M and SD3.5-L, which differ only in their transformer's configuration."""

    family = "sd3"
    kinds = MappingProxyType({"StableDiffusion3Pipeline": StableDiffusion3Pipeline})
    optional_parts = ("text_encoder_3", "tokenizer_3")
    """Without T5, zeros take the place of its `max_sequence_length` tokens, as in the pipeline itself."""

    @classmethod
    def check_files(cls, files: PipelineFiles) -> None:
        require_vae(files, files.config("transformer")["in_channels"])
        clip_tokens(files, CLIP_ENCODERS)

    def _plan(self) -> None:
        transformer, factor = self._files.config("transformer"), vae_factor(self._files)
        patch = transformer["patch_size"]
        height, width = image_sides(self._settings, transformer["sample_size"] * factor, patch * factor)
        largest = transformer["pos_embed_max_size"] * patch * factor
        if max(height, width) > largest:
            raise ModelError(
                f"backbone.height x width = {height} x {width}: this model has positions for sides up to {largest}"
            )
        self.latent_shape = (transformer["in_channels"], height // factor, width // factor)
        self._image_tokens = (height // factor // patch) * (width // factor // patch)
        self._scheduler = scheduler_config(self._files)
        self._clip_tokens = clip_tokens(self._files, CLIP_ENCODERS)
        self.guidance = Guidance.CLASSIFIER_FREE

    def _text_tokens(self) -> int:
        # The two CLIP encoders share their token positions; T5's tokens follow them.
        return self._clip_tokens + self._settings.max_sequence_length

    def _prepare(self, pipeline: DiffusionPipeline) -> None:
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
            if tokenizer is not None:
                make_special_tokens_plain_text(tokenizer)

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._settings.max_sequence_length,
            device=self.device,
        )
        return Conditioning({"tokens_BLd": tokens, "pooled_Bd": pooled})

    def _predict(
        self,
        transformer: torch.nn.Module,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float,  # noqa: ARG002
    ) -> Tensor:
        velocity: Tensor = transformer(
            hidden_states=latents_Bchw,
            timestep=sigma_B * TIMESTEP_SCALE,
            encoder_hidden_states=conditioning.tensors["tokens_BLd"],
            pooled_projections=conditioning.tensors["pooled_Bd"],
            return_dict=False,
        )[0]
        return velocity

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return pipeline_sigmas(self._scheduler, num_steps, linear_mu_of(self._scheduler, self._image_tokens))
