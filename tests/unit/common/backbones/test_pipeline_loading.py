"""Pipelines as people save them: parts left out on purpose, copies in half precision, weights that are missing."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from common import seeding
from common.errors import ModelError
from common.policies import SamplingSpec
from common.types import Network, Prompt
from learner.training.networks import COLD_START, Networks, StageSettings
from rollout_workers.sampler import EVALUATION, sample_for_evaluation
from tests.helpers.tiny_families import FAMILIES, TinyFamily
from tests.helpers.tiny_flux1 import load_tiny_flux1, write_tiny_flux1
from tests.helpers.tiny_flux2 import load_tiny_klein, write_tiny_klein
from tests.helpers.tiny_pipeline import CLIP_TOKENS, IMAGE_SIDE, T5_TOKENS, load_tiny_backbone, tiny_lora
from tests.helpers.tiny_training import cold_start_settings, cold_start_trainer

PROMPT = Prompt(7, "a red circle")


@pytest.fixture(scope="module")
def without_t5(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by diffusers as its documentation saves memory."""
    path = tmp_path_factory.mktemp("pipelines") / "without_t5"
    StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None).save_pretrained(path)
    assert json.loads((path / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    return path


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_t5_the_sampler_equals_the_pipeline(without_t5: Path, guidance: float) -> None:
    backbone = load_tiny_backbone(without_t5)
    spec = SamplingSpec(Network.TEACHER, 4, guidance, eta=0.0)
    empty = backbone.encode_prompts([""])
    latents = sample_for_evaluation(backbone, [PROMPT], spec, seed=4, count=2, empty=empty)
    pipeline = StableDiffusion3Pipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT.text,
        num_images_per_prompt=2,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=guidance,
        latents=seeding.initial_noise_Gchw(4, EVALUATION, PROMPT.index, 2, backbone.latent_shape),
        max_sequence_length=T5_TOKENS,
        height=IMAGE_SIDE,
        width=IMAGE_SIDE,
        output_type="latent",
    ).images
    assert latents.std() > 0.1
    assert (latents - expected).abs().max() <= 1e-4


def test_it_trains_without_t5(without_t5: Path) -> None:
    networks = Networks(load_tiny_backbone(without_t5), StageSettings.of(cold_start_settings()), seed=0)
    before = networks.backbone.adapters.state(COLD_START)
    values = cold_start_trainer(networks).update(0).values()
    assert all(math.isfinite(value) for value in values.values())
    after = networks.backbone.adapters.state(COLD_START)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_zeros_take_the_place_of_t5(without_t5: Path, tiny_pipeline: Path) -> None:
    tokens_BLd = load_tiny_backbone(without_t5).encode_prompts(["red"]).tensors["tokens_BLd"]
    assert tokens_BLd.shape == (1, CLIP_TOKENS + T5_TOKENS, 32)
    assert tokens_BLd[:, CLIP_TOKENS:].abs().max() == 0
    whole_BLd = load_tiny_backbone(tiny_pipeline).encode_prompts(["red"]).tensors["tokens_BLd"]
    assert torch.equal(whole_BLd[:, :CLIP_TOKENS], tokens_BLd[:, :CLIP_TOKENS])
    assert whole_BLd[:, CLIP_TOKENS:].abs().max() > 0


def test_t5_takes_no_memory_in_a_forecast_where_it_is_left_out(without_t5: Path, tiny_pipeline: Path) -> None:
    sizes = [
        type(backbone).sizes(backbone._settings, tiny_lora())
        for backbone in (load_tiny_backbone(tiny_pipeline), load_tiny_backbone(without_t5))
    ]
    t5 = load_file(tiny_pipeline / "text_encoder_3" / "model.safetensors")
    assert sizes[0].text_encoders - sizes[1].text_encoders == sum(weight.numel() for weight in t5.values())
    assert sizes[0].tokens == sizes[1].tokens


def leave_out(path: Path, parts: tuple[str, ...], *, entry: bool = True) -> Path:
    """Leave parts out of a pipeline's index: as [null, null], or without an entry."""
    index = json.loads((path / "model_index.json").read_text())
    for part in parts:
        shutil.rmtree(path / part)
        index[part] = [None, None]
        if not entry:
            del index[part]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_part_may_be_left_out_without_an_entry(tiny_pipeline: Path, tmp_path: Path, without_t5: Path) -> None:
    parts = ("text_encoder_3", "tokenizer_3")
    path = leave_out(shutil.copytree(tiny_pipeline, tmp_path / "other"), parts, entry=False)
    found, expected = (load_tiny_backbone(each).encode_prompts(["red"]).tensors for each in (path, without_t5))
    assert torch.equal(found["tokens_BLd"], expected["tokens_BLd"])


@pytest.mark.parametrize(
    ("write", "load", "parts"),
    [
        (None, load_tiny_backbone, ("text_encoder_2",)),
        (None, load_tiny_backbone, ("tokenizer_3",)),
        (None, load_tiny_backbone, ("transformer", "vae")),
        (write_tiny_flux1, load_tiny_flux1, ("text_encoder_2", "tokenizer_2")),
        (write_tiny_klein, load_tiny_klein, ("text_encoder",)),
    ],
)
@pytest.mark.parametrize("entry", [True, False])
def test_a_part_that_cannot_be_left_out_is_named(
    tiny_pipeline: Path,
    tmp_path: Path,
    write: Callable[[Path], object] | None,
    load: Callable[[Path], object],
    parts: tuple[str, ...],
    entry: bool,
) -> None:
    path = tmp_path / "pipeline"
    if write is None:
        shutil.copytree(tiny_pipeline, path)
    else:
        write(path)
    leave_out(path, parts, entry=entry)

    with pytest.raises(ModelError, match=r"model_index\.json leaves out .*, and a \w+ cannot sample without") as error:
        load(path)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("shard", [None, "5KB"])
def test_copies_in_half_precision_alone_are_read(family: TinyFamily, tmp_path: Path, shard: str | None) -> None:
    """As `save_pretrained(variant="fp16")` names them, in one file or in shards; the teacher's too."""
    family.write(tmp_path)
    for path in sorted(index.parent for index in tmp_path.glob("*/model_index.json")):
        pipeline = family.pipeline.from_pretrained(path, dtype=torch.float16)
        shutil.rmtree(path)
        pipeline.save_pretrained(path, variant="fp16", **({"max_shard_size": shard} if shard else {}))
    backbone = family.load(tmp_path)
    student = family.pipeline_at(tmp_path)
    sharded = (student / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert sharded == (shard is not None)
    expected = family.pipeline.from_pretrained(student, dtype=torch.float32, variant="fp16").transformer.state_dict()
    found = backbone._transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert type(backbone).sizes(backbone._settings, tiny_lora(("to_q",))).transformer == sum(
        value.numel() for value in expected.values()
    )


def test_a_file_without_an_ending_beside_a_variant_does_no_harm(tiny_pipeline: Path, tmp_path: Path) -> None:
    """diffusers' own search for variants fails on it."""
    path = shutil.copytree(tiny_pipeline, tmp_path / "noted")
    for part in ("transformer", "vae"):
        file = path / part / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
        (path / part / "README").write_text("half precision")
    assert load_tiny_backbone(path).base_fingerprint() == load_tiny_backbone(tiny_pipeline).base_fingerprint()


@pytest.mark.parametrize(
    ("part", "kind", "own"),
    [
        ("vae", "AutoencoderTiny", "AutoencoderKL"),
        ("transformer", "FluxTransformer2DModel", "SD3Transformer2DModel"),
    ],
)
def test_a_part_of_another_class_is_refused_before_it_is_loaded(
    tiny_pipeline: Path, tmp_path: Path, part: str, kind: str, own: str
) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "other")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {part: ["diffusers", kind]}))
    with pytest.raises(ModelError, match=f"its {part} is of class {kind}, and training needs {own}: save"):
        load_tiny_backbone(path)


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[2]], ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shift_factor": None}, "its vae/config.json has shift_factor = None, not a number: take the model's own VAE"),
        ({"scaling_factor": None}, "has scaling_factor = None"),
        ({"latent_channels": 16}, "its vae has 16 latent channels, its transformer 4"),
    ],
)
def test_a_vae_of_another_model_is_refused(
    family: TinyFamily, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    """It would fail at the first decoding."""
    family.write(tmp_path)
    file = family.pipeline_at(tmp_path) / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=expected):
        family.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("part", "name", "value"), [("transformer", "rope_scaling", 2.0), ("vae", "scale_factor", 8.0)]
)
def test_an_option_that_the_class_does_not_know_is_refused(
    family: TinyFamily, tmp_path: Path, part: str, name: str, value: float
) -> None:
    """diffusers would load the model without it."""
    family.write(tmp_path)
    file = family.pipeline_at(tmp_path) / part / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {name: value}))
    expected = (
        rf"its {part}/config\.json has {name} = {value}, which \w+ of diffusers [\d.]+ ignores: take the model's own"
    )
    with pytest.raises(ModelError, match=expected):
        family.load(tmp_path)
    off = {
        name: None,
        "later_switch": False,
        "later_list": [],
        "_name_or_path": "x",
        "decay": 0.999,
        "force_upcast": True,
    }
    file.write_text(json.dumps(config | off))
    family.load(tmp_path)


def test_a_variant_is_read_where_one_part_has_nothing_else(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "mixed")
    vae = path / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.bf16.safetensors"))
    assert torch.equal(
        load_tiny_backbone(path).decode(torch.ones(1, 4, 8, 8)),
        load_tiny_backbone(tiny_pipeline).decode(torch.ones(1, 4, 8, 8)),
    )


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_a_missing_weight_is_named_and_never_random(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "incomplete")
    (file,) = (path / part).glob("*.safetensors")
    state = load_file(file)
    name = min(name for name in state if name.endswith(".weight"))
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"the files of its {part} lack 1 of its weights, such as {name}: "):
        load_tiny_backbone(path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_the_libraries_add_no_report_of_their_own(
    tiny_pipeline: Path, tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "incomplete")
    (file,) = (path / part).glob("*.safetensors")
    state = load_file(file)
    del state[min(name for name in state if name.endswith(".weight"))]
    save_file(state | {"foreign.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_info()
            library.add_handler(caplog.handler)
        with pytest.raises(ModelError, match=f"the files of its {part} lack 1 of its weights"):
            load_tiny_backbone(path)
        assert [library.get_verbosity() for library in libraries] == [logging.INFO] * 2
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.remove_handler(caplog.handler)
            library.set_verbosity(verbosity)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_missing_weight_of_the_teacher_is_named(tmp_path: Path) -> None:
    write_tiny_klein(tmp_path / "student", distilled=True)
    file = write_tiny_klein(tmp_path / "teacher") / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["proj_out.weight"]
    save_file(state, file)
    with pytest.raises(
        ModelError, match=r"teacher: the files of its transformer lack 1 of its weights, such as proj_out\.weight"
    ):
        load_tiny_klein(tmp_path / "student", tmp_path / "teacher")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_bookkeeping_passes_and_foreign_weights_of_the_transformer_are_refused(
    family: TinyFamily, tmp_path: Path
) -> None:
    """A transformer of another model would be read without its extra weights."""
    family.write(tmp_path)
    before = family.load(tmp_path).base_fingerprint()
    path = family.pipeline_at(tmp_path)
    parts = [part for part in ("transformer", "vae", "text_encoder", "text_encoder_2") if (path / part).is_dir()]
    for part in parts:
        (file,) = (path / part).glob("*.safetensors")
        older = {f"layers.0.{name}": torch.arange(4) for name in ("position_ids", "relative_position_index")}
        save_file(load_file(file) | older, file, metadata={"format": "pt"})
    assert family.load(tmp_path).base_fingerprint() == before
    (file,) = (path / "transformer").glob("*.safetensors")
    save_file(load_file(file) | {"foreign.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its transformer have 1 weights that the model of .* lacks, such as foreign"):
        family.load(tmp_path)


def test_the_parts_beside_the_transformer_have_a_hash_of_their_own(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A resumed run compares it: the hash of the base, which LoRAs carry, knows the transformers alone."""
    before = load_tiny_backbone(tiny_pipeline)
    assert load_tiny_backbone(tiny_pipeline).parts_fingerprint() == before.parts_fingerprint()
    found = {before.parts_fingerprint()}
    for part in ("vae", "text_encoder", "scheduler", "tokenizer"):
        copy = shutil.copytree(tiny_pipeline, tmp_path / part)
        if part == "scheduler":
            config = json.loads((copy / part / "scheduler_config.json").read_text())
            (copy / part / "scheduler_config.json").write_text(json.dumps(config | {"shift": config["shift"] + 1}))
        elif part == "tokenizer":
            (copy / part / "notes.txt").write_text("another")
        else:
            (file,) = (copy / part).glob("*.safetensors")
            save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
        changed = load_tiny_backbone(copy)
        assert changed.base_fingerprint() == before.base_fingerprint()
        found.add(changed.parts_fingerprint())
    assert len(found) == 5
