"""Backbones of the published sizes without weights, on the device of `benchmarks/counting.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, SD3Transformer2DModel
from torch import nn

from benchmarks.counting import DEVICE
from benchmarks.random_pipelines import KLEIN_4B, SD3_VAE, SD35_MEDIUM, in_bfloat16
from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import DiffusersBackbone
from common.backbones.flux2 import Flux2
from common.backbones.sd3 import StableDiffusion3
from common.config.backbones import BackboneSection, Flux2Backbone, Sd3Backbone
from common.config.run import LoraConfig
from common.flow import static_shift_sigmas
from common.types import Guidance

SIDE = 512
"""Pixels of an image's side."""


@dataclass(frozen=True)
class FullSize:
    """A published model.

    Attributes:
        build: its transformer, cut to a number of blocks of each kind.
        build_vae: its VAE; its latents have `build_vae().config.latent_channels` channels and an eighth of the side.
        encoding: shapes of a prompt's encoding, without the sample's axis.
    """

    family: type[DiffusersBackbone[Any]]
    section: BackboneSection
    build: Callable[[int | None], nn.Module]
    latent_shape: tuple[int, int, int]
    encoding: dict[str, tuple[int, ...]]
    build_vae: Callable[[], nn.Module]

    def backbone(self, layers: int | None = None) -> DiffusersBackbone[Any]:
        """The backbone without adapters; `layers` blocks of each kind, None for all."""
        full_size = self

        class Weightless(self.family):  # type: ignore[name-defined,misc]
            def _plan_from_small_files(self) -> None:
                self.latent_shape, self.guidance = full_size.latent_shape, Guidance.CLASSIFIER_FREE
                self._files = self._teacher_files = None

            def _all_files(self) -> tuple[()]:
                return ()

            def _load_pipeline(self) -> SimpleNamespace:
                with self.device:
                    transformer, vae = in_bfloat16(lambda: full_size.build(layers)), in_bfloat16(full_size.build_vae)
                return SimpleNamespace(transformer=transformer, vae=vae, components={})

            def _fingerprint(self) -> str:
                return ""

            def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
                shapes = full_size.encoding.items()
                like = {"dtype": torch.bfloat16, "device": self.device}
                return Conditioning({name: torch.empty(len(texts), *shape, **like) for name, shape in shapes})

            def sigmas(self, num_steps: int) -> tuple[float, ...]:
                return static_shift_sigmas(num_steps, 3.0)

        return Weightless(self.section, LoraConfig(), DEVICE)


def _sd35_medium(layers: int | None) -> nn.Module:
    config = SD35_MEDIUM | {"num_layers": layers or SD35_MEDIUM["num_layers"]}
    # Of a few blocks as many have a second attention as of all.
    config["dual_attention_layers"] = tuple(range(round(config["num_layers"] * 13 / 24)))
    model: nn.Module = SD3Transformer2DModel(**config)
    return model


def _klein_4b(layers: int | None) -> nn.Module:
    blocks = {} if layers is None else {"num_layers": layers, "num_single_layers": 4 * layers}
    model: nn.Module = Flux2Transformer2DModel(**(KLEIN_4B | blocks))
    return model


MODELS = {
    "sd35_medium": FullSize(
        StableDiffusion3,
        Sd3Backbone(path=Path("none"), guidance_scale=4.5, height=SIDE, width=SIDE),
        _sd35_medium,
        (16, SIDE // 8, SIDE // 8),
        {"tokens_BLd": (77 + 128, 4096), "pooled_Bd": (2048,)},
        lambda: AutoencoderKL(**SD3_VAE),
    ),
    "flux2_klein_4b": FullSize(
        Flux2,
        Flux2Backbone(family="flux2", path=Path("none"), height=SIDE, width=SIDE),
        _klein_4b,
        (128, SIDE // 16, SIDE // 16),
        {"tokens_BLd": (512, 7680)},
        AutoencoderKLFlux2,
    ),
}
