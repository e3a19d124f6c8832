"""FLUX.2: klein (4B, 9B; a `Flux2KleinPipeline`) and dev (a `Flux2Pipeline`).

Latents here are the transformer's: 2 x 2 patches of the VAE's latents, normalised by the VAE's batch statistics, so a
token is a pixel of [128, h, w]. Standard normal noise is standard normal noise in either form.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import ATTENTION, DiffusersBackbone, image_sides, vae_factor
from common.backbones.files.pipeline_files import PipelineFiles, find_pipeline
from common.backbones.files.schedules import pipeline_sigmas, scheduler_config
from common.backbones.files.tokenizer_files import require_chat_template
from common.backbones.pipeline_loading import load_model, part_kind, require_known_options
from common.backbones.plain_text import spell_out_special_tokens
from common.config.backbones import Flux2Backbone
from common.errors import ModelError, one_line
from common.flow import flux2_mu
from common.types import Guidance, Network

KLEIN, DEV = "Flux2KleinPipeline", "Flux2Pipeline"
TEXT_LAYERS = {KLEIN: (9, 18, 27), DEV: (10, 20, 30)}
"""The concatenated outputs of these text encoder layers are the prompt's encoding, as published."""
PATCH = 2
DEFAULT_LATENT_SIDE = 128
"""VAE latents per side if the run file names no resolution: the pipelines' own default, 1024 pixels."""


class Flux2(DiffusersBackbone[Flux2Backbone]):
    """FLUX.2. If the teacher has its own path, teacher and fake score use its transformer as their base."""

    family = "flux2"
    kinds = MappingProxyType({KLEIN: Flux2KleinPipeline, DEV: Flux2Pipeline})
    lora_targets = (*ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")
    """The last two are in the single-stream blocks; in other blocks `attn.to_out` is a list of layers, not a layer."""
    own_parts = MappingProxyType({DEV: ("tokenizer",)})
    """This part is a processor; it would need torchvision, for images that our prompts never contain."""

    @classmethod
    def check_files(cls, files: PipelineFiles) -> None:
        require_chat_template(files)

    def _plan(self) -> None:
        transformer, factor = self._files.config("transformer"), vae_factor(self._files)
        pixels = PATCH * factor  # per token
        height, width = image_sides(self._settings, DEFAULT_LATENT_SIDE * factor, pixels)
        self.latent_shape = (transformer["in_channels"], height // pixels, width // pixels)
        self._scheduler = scheduler_config(self._files)
        self._text_layers = self._settings.text_encoder_layers or TEXT_LAYERS[self._files.kind]
        self._check_text_encoder(transformer["joint_attention_dim"])
        self._teacher_files = self._find_teacher(transformer)
        if transformer.get("guidance_embeds", True):
            self.guidance = Guidance.INPUT
        else:
            distilled = self._teacher_files.index.get("is_distilled", False)
            self.guidance = Guidance.NONE if distilled else Guidance.CLASSIFIER_FREE

    def _all_files(self) -> tuple[PipelineFiles, ...]:
        return self._files, self._teacher_files

    def _check_text_encoder(self, joint_width: int) -> None:
        config = self._files.config("text_encoder")
        config = config.get("text_config", config)  # dev's encoder is multimodal
        chosen = f"backbone.text_encoder_layers = {list(self._text_layers)}"
        layers, width = config["num_hidden_layers"], len(self._text_layers) * config["hidden_size"]
        if max(self._text_layers) > layers:
            raise ModelError(f"{chosen}: the text encoder at {self._files.path} has {layers} layers")
        if width != joint_width:
            raise ModelError(
                f"{chosen}: a text token is {width} numbers then, but the transformer at {self._files.path} takes "
                f"{joint_width}"
            )

    def _find_teacher(self, transformer: dict[str, Any]) -> PipelineFiles:
        if self._settings.teacher_path is None:
            return self._files
        files = find_pipeline(self._settings.teacher_path, self.family, [self._files.kind], only="transformer")
        kind = part_kind(self.kinds[files.kind], "transformer")
        require_known_options(files, "transformer", kind)
        own, other = (_with_defaults(kind, config) for config in (transformer, files.config("transformer")))
        for name, value in other.items():
            if own[name] != value:
                raise ModelError(
                    f"backbone.teacher_path {files.path} is no teacher for the student at {self._files.path}: its "
                    f"transformer has {name} = {value}, the student's {own[name]}"
                )
        return files

    def _load_teacher(self) -> torch.nn.Module:
        if self._teacher_files is self._files:
            return super()._load_teacher()
        return load_model(self._teacher_files, "transformer", type(self._transformer), self._dtype).eval()

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        try:
            return AutoTokenizer.from_pretrained(self._files.directory / "tokenizer", local_files_only=True)
        except Exception as error:  # see load_pipeline
            raise self._files.broken(f"tokenizer: {one_line(error)}") from error

    def _prepare(self, pipeline: DiffusionPipeline) -> None:
        """Trim the text encoder: drop the LM head, the vision tower and unused layers."""
        encoder = pipeline.text_encoder.model
        if self._files.kind == DEV:
            encoder = encoder.language_model
            pipeline.tokenizer = self._load_tokenizer()
        last = max(self._text_layers)
        if last < len(encoder.layers):
            encoder.layers = encoder.layers[:last]
            encoder.norm = torch.nn.Identity()  # the norm applies only to the output of all layers
        pipeline.text_encoder = encoder

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        tokens, _ = self._pipeline.encode_prompt(
            prompt=[spell_out_special_tokens(text, self._pipeline.tokenizer) for text in texts],
            device=self.device,
            max_sequence_length=self._settings.max_sequence_length,
            text_encoder_out_layers=self._text_layers,
        )
        return Conditioning({"tokens_BLd": tokens})

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
            hidden_states=latents_Bchw.flatten(2).transpose(1, 2),
            timestep=sigma_B,
            guidance=guidance_B,
            encoder_hidden_states=tokens_BLd,
            img_ids=image_positions(height, width, self.device),
            txt_ids=text_positions(tokens_BLd.shape[1], self.device),
            return_dict=False,
        )[0]
        return velocity_BLc.transpose(1, 2).reshape(latents_Bchw.shape)

    def _vae_latents(self, latents_Bchw: Tensor) -> Tensor:
        statistics = self._vae.bn
        std_c = (statistics.running_var.float() + self._vae.config.batch_norm_eps).sqrt()
        raw = latents_Bchw * std_c.view(-1, 1, 1) + statistics.running_mean.float().view(-1, 1, 1)
        return unpatchify(raw)

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        _, height, width = self.latent_shape
        return pipeline_sigmas(self._scheduler, num_steps, flux2_mu(height * width, num_steps))


def _with_defaults(kind: type[torch.nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option of a diffusers class: the configuration's, else the class's default."""
    options = list(inspect.signature(kind.__init__).parameters.values())[1:]
    found = {option.name: config.get(option.name, option.default) for option in options}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@lru_cache
def image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Positions (time, row, column, word) of image tokens, row by row: [height * width, 4]; copied to a device once."""
    rows_and_columns = torch.arange(height), torch.arange(width)
    return torch.cartesian_prod(torch.arange(1), *rows_and_columns, torch.arange(1)).to(device)


@lru_cache
def text_positions(length: int, device: torch.device) -> Tensor:
    """Positions of text tokens: [length, 4]; copied to a device once."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(length)).to(device)


def unpatchify(patches_Bchw: Tensor) -> Tensor:
    """Convert 2 x 2 patches with channels (channel, row, column) to an image: [B, 4c, h, w] -> [B, c, 2h, 2w]."""
    batch, channels, height, width = patches_Bchw.shape
    patches = patches_Bchw.reshape(batch, channels // PATCH**2, PATCH, PATCH, height, width)
    return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // PATCH**2, height * PATCH, width * PATCH)
