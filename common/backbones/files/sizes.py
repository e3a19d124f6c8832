"""Sizes of a model, from its small files and the headers of its weight files; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.backbones.files.flops import Shapes, forward_flops
from common.backbones.files.pipeline_files import PipelineFiles
from common.backbones.lora_targets import binds, require_bound
from common.config.backbones import BackboneSection
from common.types import Guidance


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a pipeline.

    Attributes:
        transformer, text_encoders, vae: number of weights.
        bases: number of frozen transformers: 2 if the teacher's is not the student's.
        adapter: number of weights of one adapter.
        layers, width: blocks of the transformer, and hidden units per token.
        image_tokens, text_tokens: tokens per sample.
        latents: numbers of a sample's latents.
        forward_flops: operations per sample through the transformer, see `common/backbones/files/flops.py`.
        pixels: pixels per image.
        vae_width: channels of the decoder at full resolution.
        guided_passes: passes of the transformer for one guided sample of the teacher.
        guidance: the teacher's kind of guidance.
    """

    transformer: int
    text_encoders: int
    vae: int
    bases: int
    adapter: int
    layers: int
    width: int
    image_tokens: int
    text_tokens: int
    latents: int
    forward_flops: float
    pixels: int
    vae_width: int
    guided_passes: int
    guidance: Guidance

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


def model_sizes(
    files: PipelineFiles,
    settings: BackboneSection,
    latent_shape: tuple[int, int, int],
    text_tokens: int,
    lora_targets: Sequence[str],
    lora_rank: int,
    guidance: Guidance,
) -> ModelSizes:
    """Compute the sizes of a diffusers pipeline whose backbone has these latents [c, h, w]."""
    transformer, vae, options = files.config("transformer"), files.config("vae"), settings.model_dump()
    shapes = files.weight_shapes("transformer")
    encoders = [name for name in files.parts if name.startswith("text_encoder")]
    channels, height, width = latent_shape
    # FLUX packs patches into channels, inside the backbone or before it; SD3 patchifies in its first layer.
    packed_inside = transformer["in_channels"] // channels * (transformer.get("patch_size") or 1) ** 2
    packed_before = channels // vae["latent_channels"]
    side = 2 ** (len(vae["block_out_channels"]) - 1)
    layers = transformer["num_layers"] + transformer.get("num_single_layers", 0)
    hidden = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    image_tokens = height * width // packed_inside
    return ModelSizes(
        transformer=weights(shapes),
        text_encoders=sum(weights(files.weight_shapes(name)) for name in encoders),
        vae=weights(files.weight_shapes("vae")),
        bases=1 if options.get("teacher_path") is None else 2,
        adapter=adapter_weights(shapes, lora_targets, lora_rank),
        layers=layers,
        width=hidden,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        latents=math.prod(latent_shape),
        forward_flops=forward_flops(shapes, layers, hidden, image_tokens, text_tokens),
        pixels=height * width * packed_before * side**2,
        vae_width=vae["block_out_channels"][0],
        guided_passes=2 if guidance is Guidance.CLASSIFIER_FREE and settings.guidance_scale != 1 else 1,
        guidance=guidance,
    )


def weights(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def adapter_weights(shapes: Shapes, targets: Sequence[str], rank: int) -> int:
    """Weights of a LoRA of this rank on all matrices [out, in] whose layer's name ends in one of the targets.

    Raises:
        ModelError: no layer's name ends in one of the targets.
    """
    matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    require_bound(targets, matrices)
    bound = (shape for name, shape in matrices.items() if any(binds(target, name) for target in targets))
    return sum(rank * sum(shape) for shape in bound)
