"""Every model family as a tiny pipeline: how it is written, loaded by us, and sampled by diffusers itself.

Of SD3 the most there is, SD3.5-M; the tests of the trainers are about SD3-M.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import Flux2KleinPipeline, FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor

from common.backbones.base import Backbone
from common.backbones.flux1 import pack
from tests.helpers import tiny_flux1, tiny_flux2, tiny_pipeline
from tests.helpers.tiny_pipeline import UNUSED_MODULE

STEPS = 3


@dataclass(frozen=True)
class TinyFamily:
    """One family.

    Attributes:
        write: saves what `load` needs into a directory.
        load: a backbone of its own on it.
        pipeline_at: the diffusers pipeline the student belongs to.
        pack: latents as that pipeline takes them.
        call: further arguments of the pipeline; STEPS steps from the same noise levels, no classifier-free guidance.
        unused: parts of module names whose adapters no loss can reach.
    """

    name: str
    write: Callable[[Path], object]
    load: Callable[[Path], Backbone]
    pipeline: type[Any]
    call: Mapping[str, Any]
    pipeline_at: Callable[[Path], Path] = field(default=lambda directory: directory / "student")
    pack: Callable[[Tensor], Tensor] = field(default=lambda latents: latents)
    unused: tuple[str, ...] = ()


def _write_klein(directory: Path) -> None:
    tiny_flux2.write_tiny_klein(directory / "student", seed=1, distilled=True)
    tiny_flux2.write_tiny_klein(directory / "teacher")


FAMILIES = (
    TinyFamily(
        "sd35m",
        write=lambda path: tiny_pipeline.write_tiny_pipeline(path / "student", dual_attention=(0,)),
        load=lambda path: tiny_pipeline.load_tiny_backbone(path / "student"),
        pipeline=StableDiffusion3Pipeline,
        call={
            "sigmas": [1 - step / STEPS for step in range(STEPS)],
            "guidance_scale": 1.0,
            "max_sequence_length": tiny_pipeline.T5_TOKENS,
            "height": tiny_pipeline.IMAGE_SIDE,
            "width": tiny_pipeline.IMAGE_SIDE,
        },
        unused=(UNUSED_MODULE,),
    ),
    TinyFamily(
        "flux2",
        write=_write_klein,
        load=lambda path: tiny_flux2.load_tiny_klein(path / "student", teacher=path / "teacher"),
        pipeline=Flux2KleinPipeline,
        call={
            "num_inference_steps": STEPS,
            "max_sequence_length": tiny_flux2.TEXT_TOKENS,
            "text_encoder_out_layers": tiny_flux2.TEXT_LAYERS,
            "height": tiny_flux2.HEIGHT,
            "width": tiny_flux2.WIDTH,
        },
    ),
    TinyFamily(
        "flux1",
        write=lambda path: tiny_flux1.write_tiny_flux1(path / "student"),
        load=lambda path: tiny_flux1.load_tiny_flux1(path / "student"),
        pipeline=FluxPipeline,
        call={
            "num_inference_steps": STEPS,
            "guidance_scale": 1.5,
            "max_sequence_length": tiny_flux1.T5_TOKENS,
            "height": tiny_flux1.HEIGHT,
            "width": tiny_flux1.WIDTH,
        },
        pack=pack,
    ),
)
