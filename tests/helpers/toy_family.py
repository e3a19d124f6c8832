"""A model family that is no diffusers pipeline: one file, as docs/backbones.md asks for.

The model is a linear map of latents and prompt; its decoder shows the latents' three channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.backbones.adapters import AdapterBank
from common.backbones.base import Conditioning
from common.backbones.diffusers_backbone import image_sides, module_fingerprint
from common.config.backbones import ImportedBackbone
from common.config.run import LoraConfig
from common.errors import ModelError
from common.flow import static_shift_sigmas
from common.types import Guidance, Network

CHANNELS, WORDS = 3, 4
DEFAULT_SIDE, TOKEN = 4, 2


class ToyModel(nn.Module):
    """velocity = mix(latents, sigma, prompt), pixel by pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(CHANNELS + 1 + WORDS, 16)
        self.out = nn.Linear(16, CHANNELS)

    def forward(self, latents_Bchw: Tensor, sigma_B: Tensor, words_Bd: Tensor) -> Tensor:
        height, width = latents_Bchw.shape[2:]
        context = torch.cat([sigma_B[:, None], words_Bd], dim=1)[:, None, None].expand(-1, height, width, -1)
        hidden = self.mix(torch.cat([latents_Bchw.permute(0, 2, 3, 1), context], dim=3)).tanh()
        return self.out(hidden).permute(0, 3, 1, 2)


def write_toy(directory: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(ToyModel().state_dict(), directory / "toy.safetensors")
    return directory


class ToyFlow:
    """The `Backbone` protocol."""

    def __init__(self, settings: ImportedBackbone, lora: LoraConfig, device: torch.device) -> None:
        height, width = image_sides(settings, DEFAULT_SIDE, TOKEN)
        self.latent_shape = (CHANNELS, height, width)
        self.device, self.guidance = device, Guidance.CLASSIFIER_FREE
        self._shift = settings.options["shift"]
        model = ToyModel()
        try:
            model.load_state_dict(load_file(settings.path / "toy.safetensors"))
        except OSError as error:
            raise ModelError(f"no toy at {settings.path}: {error}") from error
        self._fingerprint = module_fingerprint(model)
        bases = dict.fromkeys(Network, model.to(device))
        self.adapters = AdapterBank(bases, rank=lora.rank, alpha=lora.alpha, targets=lora.targets or ("mix", "out"))
        self.adapters.define(Network.TEACHER, ())

    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        rows = [[text.count(letter) / 4 for letter in "aeio"] for text in texts]
        return Conditioning({"words_Bd": torch.tensor(rows, device=self.device)})

    def velocity(
        self,
        network: Network,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float | None = None,
    ) -> Tensor:
        with self.adapters.active(network) as model:
            return model(latents_Bchw, sigma_B.to(self.device), conditioning.tensors["words_Bd"])

    def decode(self, latents_Bchw: Tensor) -> Tensor:
        return latents_Bchw.sigmoid()

    def image_features(self, images_BCHW: Tensor) -> list[Tensor]:
        return [images_BCHW]

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return static_shift_sigmas(num_steps, self._shift)

    def base_fingerprint(self) -> str:
        return self._fingerprint

    def enable_gradient_checkpointing(self) -> None:
        """Two layers have no activations worth it."""

    def compile_blocks(self) -> None:
        """It has none."""

    def save_lora(self, directory: Path, state: dict[str, Tensor], scale: float) -> None:
        save_file({**state, "scale": torch.tensor(scale)}, directory / "toy_lora.safetensors")
