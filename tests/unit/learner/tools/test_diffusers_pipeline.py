"""Pipelines of any class: what a backbone refuses by name is refused here too, and what diffusers reads is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from common.errors import ModelError
from common.types import Prompt
from learner.tools.diffusers_pipeline import PipelinePictures
from tests.helpers.tiny_families import FAMILIES, TinyFamily
from tests.helpers.tiny_pipeline import CLIP_TOKENS, clip_tokenizer

SD3, FLUX2, FLUX1 = FAMILIES
State = dict[str, torch.Tensor]
CALL = {"num_inference_steps": 2, "height": 16, "width": 16}
LORA = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 of a few kilobytes, without a safety checker."""
    path = tmp_path_factory.mktemp("pipelines") / "sd15"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = clip_tokenizer(path.with_name("vocabulary"))
        encoder = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=2,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
        )
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(encoder),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)
    return path


@pytest.fixture
def copy(unet_pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unet_pipeline, tmp_path / "copy")


def load(path: Path) -> PipelinePictures:
    return PipelinePictures(path, CALL, "cpu", torch.float32)


def change(path: Path, part: str, changed: Callable[[State], State]) -> None:
    (file,) = (path / part).glob("*.safetensors")
    save_file(changed(load_file(file)), file, metadata={"format": "pt"})


def pictures(path: Path) -> np.ndarray:
    return load(path).pictures(Prompt(0, "red circle"), 0, 1)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_quantised_weights_of_any_part_are_refused(copy: Path, part: str) -> None:
    def fp8(state: State) -> State:
        name = min(name for name, value in state.items() if value.ndim == 2)
        return state | {name: state[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(())}

    change(copy, part, fp8)
    with pytest.raises(ModelError, match=rf"its {part} is quantised \(.* is F8_E4M3\), and only unquantised weights"):
        load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_configuration_of_quantised_weights_is_refused(copy: Path, part: str) -> None:
    file = copy / part / "config.json"
    settings = {"quantization_config": {"quant_method": "torchao"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError, match=rf"its {part} is quantised \(quantization_config\.quant_method = torchao\)"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", f"{LORA}.processor.to_q_lora.down.weight"),
        ("unet", f"{LORA}.to_q.lora_A.default.weight"),
        ("unet", f"{LORA}.to_q.base_layer.weight"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"),
    ],
)
def test_a_lora_inside_the_weights_is_named(copy: Path, part: str, name: str) -> None:
    """It used to be dropped."""
    change(copy, part, lambda state: state | {name: torch.ones(2, 2)})
    shown = rf"[\w.]*{name.removeprefix('text_model.')}"  # transformers reads names of older versions as today's
    with pytest.raises(ModelError, match=rf"its {part} has an unmerged LoRA \({shown}\), .*: merge and unload it"):
        load(copy)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_block_more_than_the_configuration_has_is_refused(copy: Path, part: str) -> None:
    change(copy, part, lambda state: state | {"mid_block.resnets.9.conv1.weight": torch.ones(2, 2)})
    with pytest.raises(
        ModelError, match=rf"of its {part} have 1 weights that the model of its config.json lacks, such"
    ):
        load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_weight_is_named(copy: Path, part: str) -> None:
    change(copy, part, lambda state: {name: state[name] for name in sorted(state)[1:]})
    with pytest.raises(ModelError, match=rf"the files of its {part} lack 1 of its weights, such as "):
        load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_in_a_pickled_file_is_refused(copy: Path, part: str) -> None:
    """As older pipelines have them: nothing here reads pickle."""
    (file,) = (copy / part).glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    found = rf"there is no {part}/\*\.safetensors in it but {file.stem}\.bin: save the pipeline with save_pretrained"
    with pytest.raises(ModelError, match=found):
        load(copy)


def test_names_of_older_versions_and_a_larger_text_model_are_read(unet_pipeline: Path, copy: Path) -> None:
    """Stable Diffusion 1.5's VAE has the first names of its attention, and text encoders are read from a whole CLIP."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    change(copy, "vae", lambda state: {renamed(name): value for name, value in state.items()})
    clip = {"vision_model.post_layernorm.bias": torch.ones(2), "text_model.embeddings.position_ids": torch.arange(4)}
    change(copy, "text_encoder", lambda state: state | clip)
    assert any(".query." in name for name in load_file(copy / "vae" / "diffusion_pytorch_model.safetensors"))
    assert np.array_equal(pictures(copy), pictures(unet_pipeline))


def test_an_adapter_beside_the_weights_is_refused(copy: Path) -> None:
    (copy / "text_encoder" / "adapter_config.json").write_text("{}")
    expected = (
        r"its text_encoder has an adapter beside its weights \(adapter_config\.json\), .*: merge it into the weights"
    )
    with pytest.raises(ModelError, match=expected):
        load(copy)


def test_a_part_without_its_folder_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "unet")
    with pytest.raises(ModelError, match=r"cannot load the pipeline at .*: there is no unet in it: download it"):
        load(copy)


def test_a_part_that_the_class_does_not_take_may_be_gone(unet_pipeline: Path, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"movq": ["diffusers", "VQModel"]}))
    assert np.array_equal(pictures(copy), pictures(unet_pipeline))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            ["pipeline", "MyPipe"],
            r"_class_name = \['pipeline', 'MyPipe'\]: only diffusers' own pipelines are supported",
        ),
        ("MyPipe", r"names the class MyPipe, and diffusers \d+\.\d+\.\d+ has no such pipeline: "),
        ("UNet2DConditionModel", "names the class UNet2DConditionModel"),
    ],
)
def test_a_pipeline_that_diffusers_does_not_have_is_named(copy: Path, kind: object, expected: str) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(ModelError, match=expected):
        load(copy)


def test_an_option_that_diffusers_ignores_is_said(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": 2.0, "old_switch": False}))
    load(copy)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"the pipeline at {copy}: its unet/config.json has rope_scaling = 2.0, which "
    )


@pytest.mark.parametrize(
    ("family", "file", "changes", "expected"),
    [
        (SD3, "vae/config.json", {"shift_factor": None}, "its vae/config.json has shift_factor = None, not a number: "),
        (FLUX1, "vae/config.json", {"scaling_factor": None}, "its vae/config.json has scaling_factor = None, "),
        (SD3, "vae/config.json", {"latent_channels": 16}, "its vae has 16 latent channels, its transformer 4"),
        (FLUX1, "tokenizer/tokenizer_config.json", {"model_max_length": 1e30}, "has model_max_length = 1e+30, but "),
        (FLUX2, "tokenizer/chat_template.jinja", None, "there is no tokenizer/chat_template.jinja in it, nor a "),
    ],
)
def test_what_our_families_refuse_in_small_files_is_refused_by_both_doors(
    family: TinyFamily, file: str, changes: dict[str, object] | None, expected: str, tmp_path: Path
) -> None:
    """It would fail at the first picture, and the error would name the options of the call."""
    family.write(tmp_path)
    path = family.pipeline_at(tmp_path)
    if changes is None:
        (path / file).unlink()
    else:
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | changes))
    with pytest.raises(ModelError) as evaluated:
        PipelinePictures(path, {}, "cpu", torch.float32)
    assert str(evaluated.value).startswith(f"cannot load the pipeline at {path}: ")
    assert expected in str(evaluated.value)
    with pytest.raises(ModelError) as trained:
        family.load(tmp_path)
    assert str(trained.value) == str(evaluated.value)


def test_a_shift_that_is_not_in_the_file_is_refused_as_a_null_is(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    file = path / "vae" / "config.json"
    config = json.loads(file.read_text())
    del config["shift_factor"]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its vae/config\.json has shift_factor = None, not a number: "):
        load(path)
