"""Weight files as people publish them: which copy is read, and what is refused by name before it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.backbones import model_sizes
from common.backbones.files import pipeline_files
from common.backbones.files.pipeline_files import find_pipeline
from common.config.backbones import Sd3Backbone
from common.errors import ModelError
from tests.conftest import HUB_NAME
from tests.helpers.tiny_flux2 import load_tiny_klein, write_tiny_klein
from tests.helpers.tiny_pipeline import CLIP_TOKENS, load_tiny_backbone, tiny_lora

KIND = "StableDiffusion3Pipeline"
TRANSFORMER = "diffusion_pytorch_model.safetensors"


def change_weights(path: Path, part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    (file,) = (path / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_a_training_wrappers_prefix_is_named(tiny_pipeline: Path, tmp_path: Path, part: str, prefix: str) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "wrapped")
    change_weights(path, part, lambda state: {f"{prefix}{name}": value for name, value in state.items()})
    with pytest.raises(ModelError, match=f"every weight of its {part} has a training wrapper's prefix {prefix}: save"):
        find_pipeline(path, "sd3", [KIND])


@pytest.mark.parametrize(
    ("part", "module"),
    [
        ("transformer", "transformer_blocks.0.attn.to_q"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_an_unmerged_lora_is_named(tiny_pipeline: Path, tmp_path: Path, part: str, module: str, beside: bool) -> None:
    """As `save_pretrained` writes a model of peft, and as scripts write an adapter among the model's own weights."""
    path = shutil.copytree(tiny_pipeline, tmp_path / "adapted")
    lora = {f"{module}.lora_{half}.default.weight": torch.ones(2, 2) for half in "AB"}

    def adapted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {name.replace(f"{module}.", f"{module}.base_layer."): value for name, value in state.items()}
        return (state if beside else moved) | lora

    change_weights(path, part, adapted)
    first = f"{module}.lora_A.default.weight" if beside else f"{module}.base_layer.bias"
    expected = (
        rf"its {part} has an unmerged LoRA \({first}\), and only merged weights are supported: merge and unload it"
    )
    with pytest.raises(ModelError, match=expected):
        find_pipeline(path, "sd3", [KIND])


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_3", "vae"])
def test_an_adapter_beside_the_weights_is_named(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    """transformers adds it to the weights, in which it may be already."""
    path = shutil.copytree(tiny_pipeline, tmp_path / "adapted")
    (path / part / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    expected = (
        rf"its {part} has an adapter beside its weights \(adapter_config\.json\), .*: merge it into the weights, if"
    )
    settings = Sd3Backbone(path=path)
    for door in (lambda: load_tiny_backbone(path), lambda: model_sizes(settings, tiny_lora())):
        with pytest.raises(ModelError, match=expected):
            door()


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf"])
def test_a_quantised_part_is_refused_with_a_remedy(tiny_pipeline: Path, tmp_path: Path, part: str, method: str) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "quantised")
    config = json.loads((path / part / "config.json").read_text())
    (path / part / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    expected = (
        rf"its {part} is quantised \(quantization_config\.quant_method = {method}\), and only unquantised weights are "
        r"supported: use the unquantised pipeline; less memory is needed with backbone\.text_encoder_int8"
    )
    settings = Sd3Backbone(path=path)
    for door in (lambda: load_tiny_backbone(path), lambda: model_sizes(settings, tiny_lora())):
        with pytest.raises(ModelError, match=expected):
            door()
    (path / part / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    load_tiny_backbone(path)


def test_files_that_diffusers_does_not_read_may_lie_beside_the_weights(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "extra")
    lora = {"transformer.a.lora_A.weight": torch.ones(2, 2)}
    save_file(lora, path / "transformer" / "pytorch_lora_weights.safetensors")
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, path / "transformer" / "sd3-fp8.safetensors")
    assert load_tiny_backbone(path).base_fingerprint() == load_tiny_backbone(tiny_pipeline).base_fingerprint()
    assert model_sizes(Sd3Backbone(path=path), tiny_lora()) == model_sizes(Sd3Backbone(path=tiny_pipeline), tiny_lora())


def test_weights_under_another_name_are_not_read(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "renamed")
    (path / "transformer" / TRANSFORMER).rename(path / "transformer" / "sd3.safetensors")
    with pytest.raises(ModelError, match=r"no weight file that diffusers reads in transformer, but sd3\.safetensors"):
        find_pipeline(path, "sd3", [KIND])


def test_a_git_lfs_pointer_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "pointer")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4169\n"
    (path / "transformer" / TRANSFORMER).write_text(pointer)
    with pytest.raises(ModelError, match=f"{TRANSFORMER} is a Git LFS pointer.*: fetch it with git lfs pull"):
        find_pipeline(path, "sd3", [KIND])


def test_the_statistics_of_a_vae_are_weights_too(tmp_path: Path) -> None:
    """A VAE that was saved from its parameters alone; its images would have mean 0 and variance 1."""
    path = write_tiny_klein(tmp_path / "klein")
    change_weights(
        path, "vae", lambda state: {name: value for name, value in state.items() if not name.startswith("bn.running")}
    )
    with pytest.raises(ModelError, match=r"the files of its vae lack 2 of its weights, such as bn\.running_mean"):
        load_tiny_klein(path)


def test_a_tokenizer_without_a_chat_template_is_refused_by_its_file(tmp_path: Path) -> None:
    path = write_tiny_klein(tmp_path / "klein")
    template = path / "tokenizer" / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    with pytest.raises(ModelError, match=r"there is no tokenizer/chat_template\.jinja in it, nor a chat_template in"):
        load_tiny_klein(path)
    config = path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": text}))
    load_tiny_klein(path).encode_prompts(["a"])


@pytest.mark.parametrize("length", [int(1e30), 1e30, 0, "12", None, CLIP_TOKENS + 1])
def test_a_tokenizer_without_a_length_for_clip_is_refused_by_its_value(
    tiny_pipeline: Path, tmp_path: Path, length: object
) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "endless")
    config = path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": length}))
    expected = rf"model_max_length = .*, but its text_encoder and text_encoder_2 can read {CLIP_TOKENS} tokens: write"
    for door in (lambda: load_tiny_backbone(path), lambda: model_sizes(Sd3Backbone(path=path), tiny_lora())):
        with pytest.raises(ModelError, match=expected):
            door()


def test_a_quantised_teacher_is_refused(tmp_path: Path) -> None:
    student, teacher = (write_tiny_klein(tmp_path / name) for name in ("student", "teacher"))
    file = teacher / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ModelError, match=r"teacher: its transformer is quantised"):
        load_tiny_klein(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused_whatever_the_configuration_says(
    tiny_pipeline: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "quantised")
    change_weights(path, "transformer", lambda state: state | {"proj_out.weight": state["proj_out.weight"].to(dtype)})
    with pytest.raises(ModelError, match=r"its transformer is quantised \(diffusion.*: proj_out\.weight is "):
        load_tiny_backbone(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diffusion_pytorch_model.fp8.safetensors", "but the variant fp8: variants that can be read are bf16, fp16"),
        ("diffusion_pytorch_model.bin", r"but diffusion_pytorch_model\.bin: save the pipeline with save_pretrained"),
        ("flux-Q4_K_S.gguf", r"but flux-Q4_K_S\.gguf: save"),
    ],
)
def test_weights_of_another_kind_are_named(tiny_pipeline: Path, tmp_path: Path, name: str, expected: str) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "other")
    (path / "transformer" / TRANSFORMER).rename(path / "transformer" / name)
    with pytest.raises(ModelError, match=rf"there is no transformer/\*\.safetensors in it {expected}"):
        find_pipeline(path, "sd3", [KIND])


def test_one_variant_must_serve_every_part_without_a_plain_copy(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "mixed")
    (path / "transformer" / TRANSFORMER).rename(path / "transformer" / "diffusion_pytorch_model.bf16.safetensors")
    (path / "text_encoder" / "model.safetensors").rename(path / "text_encoder" / "model.fp16.safetensors")
    expected = (
        r"no text_encoder/\*\.safetensors in it but the variant fp16, which another part lacks: one variant must serve"
    )
    with pytest.raises(ModelError, match=expected):
        find_pipeline(path, "sd3", [KIND])


def test_a_link_whose_file_is_gone_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The hub's cache is links to blobs; a directory of links is read, one that points nowhere is named."""
    path = shutil.copytree(tiny_pipeline, tmp_path / "linked")
    file, blob = path / "vae" / TRANSFORMER, tmp_path / "blob"
    file.rename(blob)
    file.symlink_to(blob)
    assert find_pipeline(path, "sd3", [KIND]).weight_shapes("vae") != {}
    blob.unlink()
    with pytest.raises(ModelError, match=r"vae/diffusion_.* is a link to a file that is not there: download or copy"):
        find_pipeline(path, "sd3", [KIND])


def test_a_path_beside_the_pipeline_is_led_to_it(tiny_pipeline: Path) -> None:
    for path in (tiny_pipeline.parent, tiny_pipeline / "transformer", tiny_pipeline / "model_index.json"):
        with pytest.raises(ModelError, match=f"no pipeline at {path}: .*; there is one at {tiny_pipeline}$"):
            find_pipeline(path, "sd3", [KIND])
    with pytest.raises(ModelError, match=r"not a file: convert it with diffusers' from_single_file"):
        find_pipeline(tiny_pipeline / "transformer" / TRANSFORMER, "sd3", [KIND])


def test_a_variant_of_the_hub_is_downloaded_where_there_is_nothing_else(
    cached: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == str(HUB_NAME)
        asked.append((allow_patterns, ignore_patterns))
        if not ignore_patterns:
            shutil.copyfile(
                tiny_pipeline / "vae" / TRANSFORMER, cached / "vae" / "diffusion_pytorch_model.fp16.safetensors"
            )
        return str(cached)

    monkeypatch.setattr(pipeline_files, "snapshot_download", snapshot_download)
    (cached / "vae" / TRANSFORMER).unlink()
    files = find_pipeline(HUB_NAME, "sd3", [KIND])
    files.fetch_weights()
    assert files.variant == "fp16"
    assert asked[-2][1][:2] == ["*.bf16.*", "*.bf16-*"]
    assert asked[-1] == (["vae/*.safetensors", "vae/*.safetensors.*.json"], [])
