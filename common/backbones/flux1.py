"""FLUX.1-dev: a diffusers `FluxPipeline`. Guidance is an input of its transformer, so no pass is doubled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import DiffusersBackbone, image_sides, require_vae, vae_factor
from common.backbones.files.pipeline_files import PipelineFiles
from common.backbones.files.schedules import linear_mu_of, pipeline_sigmas, scheduler_config
from common.backbones.files.tokenizer_files import clip_tokens
from common.backbones.plain_text import make_special_tokens_plain_text
from common.config.backbones import Flux1Backbone
from common.types import Guidance, Network

PATCH = 2
DEFAULT_LATENT_SIDE = 128
"""Latents per side if the run file names no resolution: the pipeline's own default, 1024 pixels."""


class Flux1(DiffusersBackbone[Flux1Backbone]):
    """FLUX.1. A model without guidance input (FLUX.1-schnell) does not support guidance."""

    family = "flux1"
    kinds = MappingProxyType({"FluxPipeline": FluxPipeline})

    @classmethod
    def check_files(cls, files: PipelineFiles) -> None:
        require_vae(files, files.config("transformer")["in_channels"] // PATCH**2)
        clip_tokens(files, ("text_encoder",))

    def _plan(self) -> None:
        transformer, factor = self._files.config("transformer"), vae_factor(self._files)
        pixels = PATCH * factor  # per token
        height, width = image_sides(self._settings, DEFAULT_LATENT_SIDE * factor, pixels)
        self.latent_shape = (transformer["in_channels"] // PATCH**2, height // factor, width // factor)
        self._image_tokens = (height // pixels) * (width // pixels)
        self._scheduler = scheduler_config(self._files)
        self.guidance = Guidance.INPUT if transformer.get("guidance_embeds") else Guidance.NONE

    def _prepare(self, pipeline: DiffusionPipeline) -> None:
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            make_special_tokens_plain_text(tokenizer)

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        tokens, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            device=self.device,
            max_sequence_length=self._settings.max_sequence_length,
        )
        return Conditioning({"tokens_BLd": tokens, "pooled_Bd": pooled})

    def _own_guidance(self, network: Network) -> float:
        settings = self._settings
        as_teacher = network in (Network.TEACHER, Network.SURROGATE_REWARD)
        return settings.guidance_scale if as_teacher else settings.student_guidance

    def _predict(
        self,
        transformer: torch.nn.Module,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float,
    ) -> Tensor:
        height, width = latents_Bchw.shape[2:]
        tokens_BLd = conditioning.tensors["tokens_BLd"]
        guidance_B = None
        if self.guidance is Guidance.INPUT:
            guidance_B = torch.full_like(sigma_B, guidance_input)
        velocity_BLc: Tensor = transformer(
            hidden_states=pack(latents_Bchw),
            timestep=sigma_B,
            guidance=guidance_B,
            pooled_projections=conditioning.tensors["pooled_Bd"],
            encoder_hidden_states=tokens_BLd,
            txt_ids=torch.zeros(tokens_BLd.shape[1], 3, device=self.device),
            img_ids=image_positions(height // PATCH, width // PATCH, self.device),
            return_dict=False,
        )[0]
        return unpack(velocity_BLc, height, width)

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return pipeline_sigmas(self._scheduler, num_steps, linear_mu_of(self._scheduler, self._image_tokens))


@lru_cache
def image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Positions (0, row, column) of image tokens, row by row: [height * width, 3]; copied to a device once."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).float().to(device)


def pack(latents_Bchw: Tensor) -> Tensor:
    """Latents as 2 x 2 patches with channels in the order (channel, row, column): [B, c, 2h, 2w] -> [B, h * w, 4c]."""
    batch, channels, height, width = latents_Bchw.shape
    patches = latents_Bchw.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens_BLc: Tensor, height: int, width: int) -> Tensor:
    """Invert `pack`, for latents of this height and width."""
    batch, _, channels = tokens_BLc.shape
    patches = tokens_BLc.reshape(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width)
