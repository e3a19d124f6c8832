"""Stable Diffusion 3 and 3.5: a diffusers `StableDiffusion3Pipeline` directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from tokenizers import normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.backbones.adapters import AdapterBank
from common.backbones.base import Conditioning, Network
from common.config import LoraConfig, Sd3Backbone
from common.errors import ModelError
from common.flow import static_shift_sigmas
from common.wire import fingerprint, tensor_hashes

TIMESTEP_SCALE = 1000.0
"""SD3's transformer counts noise from 0 to 1000."""


class StableDiffusion3:
    """The `Backbone` protocol for SD3. Text encoders and VAE are frozen; the transformer carries the adapters."""

    def __init__(self, settings: Sd3Backbone, lora: LoraConfig, device: torch.device) -> None:
        """Load the pipeline.

        Raises:
            ModelError: the directory is missing, incomplete, corrupt, or holds another kind of pipeline.
        """
        self.device = device
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
        self._max_sequence_length = settings.max_sequence_length
        self._pipeline = _load(settings.path, self._dtype).to(device)
        self._transformer = self._pipeline.transformer.eval()
        self._vae = self._pipeline.vae.eval().requires_grad_(False)
        side = self._transformer.config.sample_size
        self.latent_shape = (self._transformer.config.in_channels, side, side)
        self._base_fingerprint = _fingerprint(self._transformer)
        self.adapters = AdapterBank(self._transformer, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        self.adapters.define(Network.TEACHER, ())

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
            device=self.device,
        )
        return Conditioning({"tokens_BLd": tokens, "pooled_Bd": pooled})

    def velocity(self, network: Network, latents_Bchw: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        with self.adapters.active(network):
            output = self._transformer(
                hidden_states=latents_Bchw.to(self.device, self._dtype),
                timestep=sigma_B.to(self.device) * TIMESTEP_SCALE,
                encoder_hidden_states=conditioning.tensors["tokens_BLd"],
                pooled_projections=conditioning.tensors["pooled_Bd"],
                return_dict=False,
            )
        velocity: Tensor = output[0].float()
        return velocity

    def decode(self, latents_Bchw: Tensor) -> Tensor:
        latents_Bchw = latents_Bchw / self._vae.config.scaling_factor + self._vae.config.shift_factor
        images_BCHW: Tensor = self._vae.decode(latents_Bchw.to(self._dtype), return_dict=False)[0].float()
        return (images_BCHW / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def image_features(self, images_BCHW: Tensor) -> list[Tensor]:
        encoder = self._vae.encoder
        hidden = encoder.conv_in((images_BCHW * 2 - 1).to(self.device, self._dtype))
        features = []
        for block in encoder.down_blocks:
            hidden = block(hidden)
            features.append(hidden.float())
        return features

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return static_shift_sigmas(num_steps, self._pipeline.scheduler.config.shift)

    def base_fingerprint(self) -> str:
        return self._base_fingerprint

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, through the network of the forward pass."""
        self._transformer.enable_gradient_checkpointing(self.adapters.checkpoint)

    def save_lora(self, directory: Path, state: dict[str, Tensor], scale: float) -> None:
        """Write an adapter as diffusers' own LoRA file, for `StableDiffusion3Pipeline.load_lora_weights`."""
        rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
        metadata = {
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": sorted({key.rsplit(".lora_", 1)[0] for key in state}),
        }
        self._pipeline.save_lora_weights(
            directory, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )


def _load(path: Path, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    _require_complete(path)
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, local_files_only=True)
    except Exception as error:  # diffusers raises a different class for every way a directory can be broken
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load the pipeline at {path}: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        if tokenizer is not None:
            _make_special_tokens_plain_text(tokenizer)
    return pipeline


def _require_complete(path: Path) -> None:
    """What diffusers passes over: it would load another family's parts, or find a missing tokenizer somewhere else."""
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        kind, parts = index["_class_name"], [name for name, value in index.items() if _is_part(value)]
    except OSError as error:
        raise ModelError(f"no pipeline at {path}: expected a diffusers directory with a model_index.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot load the pipeline at {path}: model_index.json is damaged: {error!r}") from error
    if kind != StableDiffusion3Pipeline.__name__:
        raise ModelError(f"{path} holds a {kind}, but family sd3 needs a {StableDiffusion3Pipeline.__name__}")
    missing = [name for name in parts if not (path / name).is_dir()]
    if missing:
        raise ModelError(f"cannot load the pipeline at {path}: there is no {', '.join(missing)} in it")


def _is_part(value: object) -> bool:
    """Parts stand in the index as [library, class]; those left out on purpose as [null, null]."""
    return isinstance(value, list) and None not in value


def _make_special_tokens_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Otherwise "<|endoftext|>" or "</s>" written in a prompt would end it for the model.

    Byte-pair encoding cannot put a special token together once it is not cut out of the text first. T5's unigram model
    can, since special tokens are pieces of its vocabulary; so they are pulled apart after normalisation.
    """
    tokenizer.split_special_tokens = True
    pull_apart = [normalizers.Replace(token, f"{token[0]} {token[1:]}") for token in tokenizer.all_special_tokens]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*([backend.normalizer] if backend.normalizer else []), *pull_apart])


def _fingerprint(module: torch.nn.Module) -> str:
    state = {name: value.detach().float().cpu().numpy() for name, value in module.state_dict().items()}
    return fingerprint(tensor_hashes(state))
