"""Protocol of a model family. The rest of the project uses a backbone only through this protocol.

The teacher is a frozen transformer. Student and fake score are stacks of LoRA adapters (see `adapters.py`), usually on
that same transformer; a student with other initial weights has its own base. The network is an argument of each forward
pass, never a state that a caller must keep track of.

Shape suffixes: see `common/types.py`. L is the length of a token sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from common.backbones.adapters import AdapterBank
from common.errors import ModelError
from common.types import Guidance, Network


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: the tensors that a family needs; the first axis of each is the sample."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def repeat(self, count: int) -> Conditioning:
        """Every prompt `count` times in a row, in the order of a group's samples in a batch."""
        return Conditioning({name: tensor.repeat_interleave(count, 0) for name, tensor in self.tensors.items()})

    def rows(self, index: slice | Tensor) -> Conditioning:
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand_to(self, count: int) -> Conditioning:
        """One encoded prompt for `count` samples, without copying it."""
        return Conditioning({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Backbone(Protocol):
    """A text-to-image flow model with its text encoders, decoder and adapters."""

    latent_shape: tuple[int, int, int]
    """[c, h, w] of one sample's latents."""
    device: torch.device
    guidance: Guidance
    adapters: AdapterBank

    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """Encode prompts; special tokens written in a prompt are plain text.

        The tensors of all prompts have the same shape but for the sample's axis, so that prompts can share a pass.
        """
        ...

    def velocity(
        self,
        network: Network,
        latents_Bchw: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance_input: float | None = None,
    ) -> Tensor:
        """v = eps - x0 as float32 [B, c, h, w], with the graph of the network's trainable adapters.

        `guidance_input` is for families with Guidance.INPUT. None means the network's own value: the run's
        `guidance_scale` for the teacher and the surrogate reward, `student_guidance` for student and fake score.
        """
        ...

    def decode(self, latents_Bchw: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1], with a graph if the latents have one."""
        ...

    def image_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the frozen VAE encoder, shallow to deep, for perceptual distances."""
        ...

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The family's schedule: num_steps + 1 noise levels from 1.0 to 0.0."""
        ...

    def base_fingerprint(self) -> str:
        """Hash of every frozen weight of student and teacher; adapters fit only this base."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, with the network of the forward pass."""
        ...

    def compile_blocks(self) -> None:
        """Compile the blocks that sampling repeats, on first use."""
        ...

    def save_lora(self, directory: Path, state: dict[str, Tensor], scale: float) -> None:
        """Write an adapter, whose update is `scale` B A, in the family's own format, into an existing directory."""
        ...


@runtime_checkable
class HasParts(Protocol):
    """An optional part of a family. With it a resumed run refuses another text encoder, decoder or noise schedule."""

    def parts_fingerprint(self) -> str:
        """Hash of all that images depend on beside the transformers: text encoders, decoder, noise schedule."""
        ...


@runtime_checkable
class RestsTeacher(Protocol):
    """An optional part of a family. With it a worker's GPU holds the teacher's own base only in evaluations of it."""

    def rest_teacher(self) -> None:
        """Keep the teacher's base in the host's memory from now on, and on the device only while it is used.

        Nothing changes if teacher and student have one base.
        """
        ...


def parts_fingerprint(backbone: Backbone) -> str:
    """See `HasParts`; "" from a family without it."""
    return backbone.parts_fingerprint() if isinstance(backbone, HasParts) else ""


def guided_velocity(
    backbone: Backbone,
    network: Network,
    latents_Bchw: Tensor,
    sigma_B: Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    scale: float,
) -> Tensor:
    """The velocity with guidance of this scale.

    Classifier-free: v_empty + scale (v - v_empty), both halves in one forward pass; scale 1 is no guidance. If guidance
    is an input, the scale is the teacher's input; student and fake score always use their own.

    Raises:
        ModelError: guidance was given to a family that takes none.
    """
    if backbone.guidance is Guidance.INPUT and network is Network.TEACHER:
        return backbone.velocity(network, latents_Bchw, sigma_B, conditioning, guidance_input=scale)
    if scale == 1.0:
        return backbone.velocity(network, latents_Bchw, sigma_B, conditioning)
    if backbone.guidance is Guidance.NONE:
        raise ModelError(
            f"guidance {scale:g} given to a model that takes none: set backbone.guidance_scale and "
            "evaluation.teacher_guidance to 1, or for a step-distilled FLUX.2 backbone.teacher_path to its base model"
        )
    count = len(latents_Bchw)
    both = Conditioning.concatenate([conditioning, empty.expand_to(count)])
    velocity = backbone.velocity(network, latents_Bchw.repeat(2, 1, 1, 1), sigma_B.repeat(2), both)
    conditional, unconditional = velocity.chunk(2)
    return unconditional + scale * (conditional - unconditional)
