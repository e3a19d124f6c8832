"""The section `backbone` of the run file: one class per family, selected by `backbone.family`.

Defaults are each family's published setting (arXiv 2605.26108). The import path of a class selects a family of your
own, see docs/backbones.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, NonNegativeInt, PositiveInt, Tag

from common.config.section import Section

IMPORT_PATH = r"^[\w.]+:\w+$"
IMPORTED = "module:Class"
"""The tag of a family that is named by its import path."""


class BackboneSection(Section):
    """Settings that all model families share."""

    path: Path = Field(
        description="A diffusers pipeline: its directory (model_index.json and its parts), or an ORGANISATION/NAME of "
        "the Hugging Face hub."
    )
    height: PositiveInt | None = Field(None, description="Image height in pixels. null: the family's default.")
    width: PositiveInt | None = Field(None, description="Image width in pixels. null: the family's default.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Type of the model's arithmetic. Sigmas, means, densities and advantages are always float32.",
    )
    guidance_scale: float = Field(1.0, ge=1, description="Guidance scale of the teacher in the losses. 1: no guidance.")
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute the transformer's activations in the backward pass. It needs less memory and a third "
        "more time.",
    )
    idle_on_cpu: bool = Field(
        False,
        description="Keep the text encoders on the CPU between two uses, and the VAE too unless it back-propagates.",
    )
    text_encoder_int8: bool = Field(
        False,
        description="Keep the text encoders' matrices as 8-bit integers with a scale per row: half of the memory of "
        "bfloat16.",
    )
    decode_chunk: PositiveInt = Field(
        16,
        description="Images that the VAE decodes at once. It bounds memory and changes pixels by float rounding only.",
    )


class Sd3Backbone(BackboneSection):
    """SD3-M, SD3.5-M, SD3.5-L: the frozen base is teacher, student and fake score at once."""

    family: Literal["sd3"] = Field("sd3", description="Model family: a StableDiffusion3Pipeline.")
    max_sequence_length: PositiveInt = Field(
        128,
        description="T5 tokens per prompt: shorter prompts are padded, longer ones cut (the pipeline: 256).",
    )
    guidance_scale: float = Field(
        7.0, ge=1, description="Classifier-free guidance scale of the teacher in the losses. 1: no guidance."
    )


class Flux2Backbone(BackboneSection):
    """FLUX.2 klein (4B, 9B) and dev. The klein student starts from the 4-step model, its teacher is the base model."""

    family: Literal["flux2"] = Field(description="Model family: a Flux2KleinPipeline or Flux2Pipeline.")
    teacher_path: Path | None = Field(
        None,
        description="Pipeline whose transformer is the base of teacher and fake score, a second frozen base. null: "
        "all three networks share the transformer at path.",
    )
    max_sequence_length: PositiveInt = Field(
        512, description="Text tokens per prompt: shorter prompts are padded, longer ones cut."
    )
    text_encoder_layers: tuple[NonNegativeInt, ...] | None = Field(
        None,
        min_length=1,
        description="Layers of the text encoder whose outputs are the prompt's encoding. Layers above the last one "
        "never run. null: klein 9, 18, 27; dev 10, 20, 30.",
    )
    guidance_scale: float = Field(
        4.0,
        ge=1,
        description="Guidance scale of the teacher in the losses. klein: classifier-free; 1: no guidance. dev: the "
        "teacher's guidance input.",
    )
    student_guidance: float = Field(
        1.0,
        ge=1,
        description="dev: the guidance input of student and fake score, in training, sampling and export. klein has "
        "no guidance input and ignores it.",
    )


class Flux1Backbone(BackboneSection):
    """FLUX.1-dev: guidance is an input of the model, and all three networks share one base."""

    family: Literal["flux1"] = Field(description="Model family: a FluxPipeline.")
    max_sequence_length: PositiveInt = Field(
        512, description="T5 tokens per prompt: shorter prompts are padded, longer ones cut."
    )
    guidance_scale: float = Field(3.5, ge=1, description="The teacher's guidance input in the losses.")
    student_guidance: float = Field(
        1.0, ge=1, description="The guidance input of student and fake score, in training, sampling and export."
    )


class ImportedBackbone(BackboneSection):
    """A family of your own: a class of (settings, lora, device) that implements common.backbones.base.Backbone."""

    family: str = Field(pattern=IMPORT_PATH, description="Import path module:Class of the family.")
    options: dict[str, JsonValue] = Field({}, description="Further settings of the family.")


def _family_of(section: Any) -> str | None:
    """The tag of a section, or of a mapping that will be validated as one."""
    if isinstance(section, BackboneSection):
        return IMPORTED if isinstance(section, ImportedBackbone) else str(section.model_dump()["family"])
    if not isinstance(section, dict):
        return None
    family = str(section.get("family", "sd3"))
    return IMPORTED if ":" in family else family


BackboneConfig = Annotated[
    Annotated[Sd3Backbone, Tag("sd3")]
    | Annotated[Flux2Backbone, Tag("flux2")]
    | Annotated[Flux1Backbone, Tag("flux1")]
    | Annotated[ImportedBackbone, Tag(IMPORTED)],
    Discriminator(_family_of),
]
BACKBONE_SECTIONS = (Sd3Backbone, Flux2Backbone, Flux1Backbone, ImportedBackbone)
BACKBONE_TAGS = ("sd3", "flux2", "flux1", IMPORTED)
