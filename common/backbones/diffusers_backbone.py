"""Base class of families that are diffusers pipelines: loading, decoding, features, fingerprint, LoRA files.

A family names its pipeline, validates and plans from the small files alone (`_plan`), and defines its text encoding,
forward pass and schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from common.backbones.adapters import AdapterBank
from common.backbones.base import Conditioning
from common.backbones.device.attention import attention_kernels
from common.backbones.device.blocks import compile_blocks
from common.backbones.device.int8 import quantise_linears
from common.backbones.device.resting import Resting
from common.backbones.device.sharding import shard
from common.backbones.encoding_cache import EncodingCache
from common.backbones.files.pipeline_files import PipelineFiles, find_pipeline
from common.backbones.files.sizes import ModelSizes, model_sizes
from common.backbones.files.tokenizer_files import tokenizer_fingerprint
from common.backbones.pipeline_loading import (
    load_options,
    load_pipeline,
    require_classes,
    require_parts,
)
from common.config.backbones import BackboneSection
from common.config.run import LoraConfig
from common.errors import ModelError
from common.types import Guidance, Network
from common.wire import fingerprint, tensor_hashes

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The published targets are the projections of the joint attention of image and text tokens.

They do not include `attn2`, SD3.5-M's second attention over the image alone.
"""


Settings = TypeVar("Settings", bound=BackboneSection)


class DiffusersBackbone(ABC, Generic[Settings]):
    """The `Backbone` protocol over a diffusers pipeline. Everything but the adapters is frozen."""

    family: ClassVar[str]
    kinds: ClassVar[Mapping[str, type[Any]]]
    """The family's pipeline classes by name."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    """Default targets of adapters, if the run file names none."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Parts that the pipeline's class asks for and samples without."""
    own_parts: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    """Parts, by pipeline class, that the family itself loads when it prepares the pipeline."""

    latent_shape: tuple[int, int, int]
    guidance: Guidance

    def __init__(self, settings: Settings, lora: LoraConfig, device: torch.device, *, sharded: bool = False) -> None:
        """Load the pipeline; `sharded` shards its transformers, see `common/backbones/device/sharding.py`.

        Raises:
            ModelError: the directory is missing, incomplete, corrupt, holds another kind of pipeline, or does not
                support the settings.
        """
        self.device = device
        self._settings = settings
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
        self._plan_from_small_files()
        for files in self._all_files():
            files.fetch_weights()
        self._pipeline = self._load_pipeline()
        if settings.text_encoder_int8:
            for encoder in self._text_encoders():
                quantise_linears(encoder)
        self._transformer = self._pipeline.transformer.eval()
        self._teacher = self._load_teacher()
        self._resting_teacher = Resting(self._teacher, device)
        self._vae = self._pipeline.vae.eval().requires_grad_(False)
        self._base_fingerprint = self._fingerprint()
        self._encodings = EncodingCache(device)
        self._place(sharded)
        self.adapters = AdapterBank(
            {Network.STUDENT: self._transformer, Network.FAKE_SCORE: self._teacher, Network.TEACHER: self._teacher},
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets or self.lora_targets,
        )
        self.adapters.define(Network.TEACHER, ())
        if settings.gradient_checkpointing:
            self.enable_gradient_checkpointing()

    @property
    def directory(self) -> Path:
        """The local directory of the student's pipeline."""
        return self._files.directory

    def load_options(self) -> dict[str, str | None]:
        """Arguments of diffusers' `from_pretrained` that the student's pipeline needs."""
        return load_options(self._files, self.kinds[self._files.kind])

    @classmethod
    def sizes(cls, settings: Settings, lora: LoraConfig) -> ModelSizes:
        """Sizes of the model, without loading it.

        Raises:
            ModelError: see `__init__`.
        """
        planned = cls.__new__(cls)
        planned._settings = settings
        planned._plan_from_small_files()
        targets = lora.targets or cls.lora_targets
        return model_sizes(
            planned._files,
            settings,
            planned.latent_shape,
            planned._text_tokens(),
            targets,
            lora.rank,
            planned.guidance,
        )

    def _plan_from_small_files(self) -> None:
        self._files = find_pipeline(self._settings.path, self.family, list(self.kinds))
        require_parts(self._files, self.kinds[self._files.kind], self.optional_parts)
        require_classes(self._files, self.kinds[self._files.kind])
        self.check_files(self._files)
        self._plan()
        scale = self._settings.guidance_scale
        if self.guidance is Guidance.NONE and scale != 1:
            raise ModelError(
                f"backbone.guidance_scale = {scale:g}: the teacher takes no guidance: set it to 1, or for a "
                "step-distilled FLUX.2 set backbone.teacher_path to its base model"
            )

    @classmethod
    def check_files(cls, files: PipelineFiles) -> None:
        """ModelError if small files show that the family's own pipeline cannot sample from them, with any settings."""

    def _all_files(self) -> tuple[PipelineFiles, ...]:
        """The pipelines whose weights are loaded."""
        return (self._files,)

    @abstractmethod
    def _plan(self) -> None:
        """Set `latent_shape` and `guidance`; raise ModelError if the small files show the settings to be impossible."""

    def _text_tokens(self) -> int:
        """Number of text tokens in the transformer, once `_plan` has accepted the settings."""
        tokens: int = self._settings.model_dump().get("max_sequence_length", 0)
        return tokens

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode the prompts; the text encoders are on the device."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> tuple[float, ...]: ...

    @abstractmethod
    def _predict(
        self,
        transformer: torch.nn.Module,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float,
    ) -> Tensor:
        """The transformer's velocity for latents in its own dtype, [B, c, h, w]."""

    def _own_guidance(self, network: Network) -> float:  # noqa: ARG002
        """The default guidance input of a network; unused by families without guidance input."""
        return 1.0

    def _prepare(self, pipeline: DiffusionPipeline) -> None:
        """Change the loaded pipeline before it moves to its device."""

    def _load_teacher(self) -> torch.nn.Module:
        """The base of teacher and fake score; by default the student's."""
        module: torch.nn.Module = self._transformer
        return module

    def _place(self, sharded: bool) -> None:
        """Move every part to its device."""
        for base in dict.fromkeys((self._transformer, self._teacher)):
            if sharded:
                shard(base, self.device)
            else:
                base.to(self.device)
        if not self._settings.idle_on_cpu:
            for part in (*self._text_encoders(), self._vae):
                part.to(self.device)

    def _vae_latents(self, latents_Bchw: Tensor) -> Tensor:
        """The latents in the decoder's scale."""
        scaled: Tensor = latents_Bchw / self._vae.config.scaling_factor + self._vae.config.shift_factor
        return scaled

    def _text_encoders(self) -> list[torch.nn.Module]:
        parts = self._pipeline.components
        return [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]

    @contextmanager
    def _on_device(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Move frozen modules that are idle on the CPU to the device for the duration of this block."""
        for module in modules:
            module.to(self.device)
        yield
        if self._settings.idle_on_cpu:
            for module in modules:
                module.to("cpu")

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        if len(texts) == 1:
            return self._encodings.get(texts[0], lambda: self._encoded(texts))
        return self._encoded(texts)

    def _encoded(self, texts: Sequence[str]) -> Conditioning:
        with self._on_device(*self._text_encoders()):
            return self._encode(texts)

    def velocity(
        self,
        network: Network,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float | None = None,
    ) -> Tensor:
        self._resting_teacher.need(network is not Network.STUDENT)
        with self.adapters.active(network) as transformer, attention_kernels(self._dtype, self.device):
            latents_Bchw, sigma_B = latents_Bchw.to(self.device, self._dtype), sigma_B.to(self.device)
            guidance = self._own_guidance(network) if guidance_input is None else guidance_input
            return self._predict(transformer, latents_Bchw, sigma_B, conditioning, guidance).float()

    def rest_teacher(self) -> None:
        """See `common.backbones.base.RestsTeacher`."""
        if self._teacher is not self._transformer:
            self._resting_teacher.rest()

    def decode(self, latents_Bchw: Tensor) -> Tensor:
        parts: tuple[Tensor, ...] = torch.split(latents_Bchw, self._settings.decode_chunk)
        if not (torch.is_grad_enabled() and latents_Bchw.requires_grad):
            with self._on_device(self._vae):
                return torch.cat([self._decode_part(part) for part in parts])
        # The backward pass needs the VAE on the device as well, whenever it runs.
        self._vae.to(self.device)
        if len(parts) == 1:
            return self._decode_part(latents_Bchw)
        # Otherwise the activations of all chunks would be kept for the backward pass.
        return torch.cat([recompute(self._decode_part, part, use_reentrant=False) for part in parts])

    def _decode_part(self, latents_Bchw: Tensor) -> Tensor:
        latents_Bchw = self._vae_latents(latents_Bchw).to(self._dtype)
        images_BCHW: Tensor = self._vae.decode(latents_Bchw, return_dict=False)[0].float()
        return (images_BCHW / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def image_features(self, images_BCHW: Tensor) -> list[Tensor]:
        encoder = self._vae.encoder
        with self._on_device(encoder):
            hidden = encoder.conv_in((images_BCHW * 2 - 1).to(self.device, self._dtype))
            features = []
            for block in encoder.down_blocks:
                hidden = block(hidden)
                features.append(hidden.float())
        return features

    def base_fingerprint(self) -> str:
        return self._base_fingerprint

    @cached_property
    def _parts_fingerprint(self) -> str:
        scale = [self._vae.config.get(key) for key in ("scaling_factor", "shift_factor")]
        hashes = {"sigmas": repr(self.sigmas(8)), "scale": repr(scale)}
        for name, part in self._pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name != "transformer":
                hashes[name] = module_fingerprint(part)
            elif name.startswith("tokenizer") and part is not None:
                hashes[name] = tokenizer_fingerprint(self._files.directory / name)
        return fingerprint(hashes)

    def parts_fingerprint(self) -> str:
        """Hash of text encoders, tokenizers, VAE and noise schedule; the transformers are in `base_fingerprint`."""
        return self._parts_fingerprint

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, with the network of the forward pass."""
        transformers: list[Any] = [*self.adapters.modules()]
        for transformer in transformers:
            transformer.enable_gradient_checkpointing(self._checkpoint)

    def compile_blocks(self) -> None:
        """Compile the blocks that sampling repeats, on first use."""
        compile_blocks(self.adapters.modules())

    def _checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        def with_same_kernels(*inputs: Any) -> Any:
            with attention_kernels(self._dtype, self.device):
                return function(*inputs)

        return self.adapters.checkpoint(with_same_kernels, *inputs)

    def save_lora(self, directory: Path, state: dict[str, Tensor], scale: float) -> None:
        """Write an adapter as diffusers' own LoRA file, for `load_lora_weights` of the family's pipeline."""
        rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
        metadata = {
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": sorted({key.rsplit(".lora_", 1)[0] for key in state}),
        }
        self._pipeline.save_lora_weights(
            directory, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )

    def converted_lora(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another program's LoRA with diffusers' names, converted by the pipeline's class, which raises as it likes."""
        converted: dict[str, Tensor] = self._pipeline.lora_state_dict(dict(tensors))
        return converted

    def _load_pipeline(self) -> DiffusionPipeline:
        kind = self._files.kind
        pipeline = load_pipeline(self._files, self.kinds[kind], self._dtype, self.own_parts.get(kind, ()))
        pipeline.set_progress_bar_config(disable=True)
        self._prepare(pipeline)
        return pipeline

    def _fingerprint(self) -> str:
        if self._teacher is self._transformer:
            return module_fingerprint(self._transformer)
        return fingerprint(
            {"student": module_fingerprint(self._transformer), "teacher": module_fingerprint(self._teacher)}
        )


def image_sides(settings: BackboneSection, default: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        ModelError: a side is not a multiple of `multiple`, the pixels of one transformer token.
    """
    sides = {"height": settings.height or default, "width": settings.width or default}
    for name, side in sides.items():
        if side % multiple:
            below = side // multiple * multiple
            choice = f"{below} or {below + multiple}" if below else str(multiple)
            raise ModelError(f"backbone.{name} = {side}: this model's images are multiples of {multiple}: use {choice}")
    return sides["height"], sides["width"]


def require_vae(files: PipelineFiles, channels: int) -> None:
    """ModelError unless the VAE's latents have these channels, a scale and a shift: the pipeline decodes with them."""
    vae = files.config("vae")
    if vae["latent_channels"] != channels:
        raise files.broken(f"its vae has {vae['latent_channels']} latent channels, its transformer {channels}")
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(vae.get(name), int | float):
            raise files.broken(
                f"its vae/config.json has {name} = {vae.get(name)}, not a number: take the model's own VAE"
            )


def vae_factor(files: PipelineFiles) -> int:
    """Pixels per latent, along one side."""
    return int(2 ** (len(files.config("vae").get("block_out_channels", (0,))) - 1))


def module_fingerprint(module: torch.nn.Module) -> str:
    """Hash of a module's weights, computed one by one: a copy of all would be as large as the model."""
    hashes: dict[str, str] = {}
    for name, value in module.state_dict().items():
        # numpy has no bfloat16, so the bits are hashed as integers.
        bits = value.detach().cpu().view(torch.int16) if value.dtype == torch.bfloat16 else value.detach().cpu()
        hashes |= tensor_hashes({name: bits.numpy()})
    return fingerprint(hashes)
