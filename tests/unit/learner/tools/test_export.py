"""Exports: diffusers loads each of them, and its pictures are ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from common import seeding
from common.backbones.sd3 import StableDiffusion3
from common.config.run import Config
from common.errors import ModelError
from common.policies import SamplingSpec
from common.types import ByteArray, Guidance, Network, Prompt
from learner.tools.export import _call_options, main, write_comfyui, write_pipeline
from learner.training.lora_file import student_lora
from rollout_workers.sampler import EVALUATION, sample_pictures
from tests.conftest import HUB_NAME
from tests.helpers.trained_run import tiny_config, write_trained_run

PROMPT = Prompt(4, "red circle")
SEED = 3
COUNT = 2

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "run"
    write_trained_run(directory, tiny_pipeline)
    return directory


@pytest.fixture(scope="module")
def student(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3:
    return write_trained_run(tmp_path_factory.mktemp("student") / "run", tiny_pipeline)


def ours(backbone: StableDiffusion3, network: Network = Network.STUDENT) -> ByteArray:
    """Four steps without stochasticity, as diffusers' Euler scheduler makes them."""
    spec = SamplingSpec(network, 4, guidance=1.0, eta=0.0)
    empty = backbone.encode_prompts([""])
    return sample_pictures(backbone, PROMPT, spec, seed=SEED, count=COUNT, empty=empty)


def theirs(pipeline: StableDiffusion3Pipeline) -> ByteArray:
    """diffusers' own pictures from the same noise, called as the export says."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT.text,
        num_images_per_prompt=COUNT,
        latents=seeding.initial_noise_Gchw(SEED, EVALUATION, PROMPT.index, COUNT, (4, 8, 8)),
        sigmas=[1, 0.75, 0.5, 0.25],
        guidance_scale=1.0,
        height=16,
        width=16,
        max_sequence_length=10,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def assert_same_pictures(found: ByteArray, expected: ByteArray) -> None:
    """Up to a rounding of the last bit of a pixel."""
    assert found.shape == expected.shape == (COUNT, 16, 16, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def exported(run: Path, out: Path, kind: str) -> None:
    assert main(["--run", str(run), "--format", kind, "--out", str(out)]) == 0


def test_the_student_is_not_its_teacher(student: StableDiffusion3) -> None:
    """Otherwise the tests below would prove nothing."""
    assert np.abs(ours(student).astype(int) - ours(student, Network.TEACHER)).max() > 10


def test_diffusers_makes_our_pictures_with_the_lora(
    run: Path, student: StableDiffusion3, tiny_pipeline: Path, tmp_path: Path
) -> None:
    exported(run, tmp_path, "lora")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(tmp_path)
    assert_same_pictures(theirs(pipeline), ours(student))
    assert json.loads((tmp_path / "about.json").read_text()) == {
        "base": student.base_fingerprint(),
        "scale": 1.0,
    }


def test_diffusers_makes_our_pictures_with_the_merged_pipeline(
    run: Path, student: StableDiffusion3, tiny_pipeline: Path, tmp_path: Path
) -> None:
    exported(run, tmp_path / "merged", "pipeline")
    assert_same_pictures(theirs(StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged")), ours(student))
    changed = {"diffusion_pytorch_model.safetensors"}
    for part in (entry.name for entry in tiny_pipeline.iterdir() if entry.is_dir() and entry.name != "clip_vocabulary"):
        files = sorted((tiny_pipeline / part).iterdir())
        assert [file.name for file in sorted((tmp_path / "merged" / part).iterdir())] == [file.name for file in files]
        for file in files:
            equal = file.read_bytes() == (tmp_path / "merged" / part / file.name).read_bytes()
            assert equal == (part != "transformer" or file.name not in changed), file


@pytest.mark.usefixtures("cached")
def test_a_base_of_the_hub_is_merged_where_it_was_downloaded_to(tmp_path: Path) -> None:
    student = write_trained_run(tmp_path / "run", HUB_NAME)
    exported(tmp_path / "run", tmp_path / "merged", "pipeline")
    assert_same_pictures(theirs(StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged")), ours(student))


def test_diffusers_makes_our_pictures_with_the_file_for_comfyui(
    run: Path, student: StableDiffusion3, tiny_pipeline: Path, tmp_path: Path
) -> None:
    exported(run, tmp_path, "comfyui")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="tiny-rtdmd.safetensors")
    assert_same_pictures(theirs(pipeline), ours(student))


def test_the_file_for_comfyui_is_keyed_as_its_loader_asks(
    student: StableDiffusion3, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Its rule: x.lora_B.weight @ x.lora_A.weight, times 1 without x.alpha, is added to the weight that x stands for:
    "transformer." and the weight's path in diffusers, but for its last part.
    """
    write_comfyui(student_lora(student), student.adapters.scale, tmp_path / "file.safetensors")
    file = load_file(tmp_path / "file.safetensors")
    merged = tmp_path / "merged"
    write_pipeline(student_lora(student), student.adapters.scale, tiny_pipeline, merged)
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors") for path in (tiny_pipeline, merged)
    )
    used = set()
    for key, weight in before.items():
        name = f"transformer.{key.removesuffix('.weight')}"
        if f"{name}.lora_B.weight" in file:
            weight = weight + file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"]
            used |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        torch.testing.assert_close(after[key], weight, rtol=0, atol=1e-6)
    assert used == set(file)


ONE, TWO = (f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2))


def test_a_merge_by_hand(tmp_path: Path) -> None:
    """2 (B A) added in float32, rounded once to the file's bfloat16; the second shard has no update."""
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    (base / "model_index.json").write_text('{"_class_name": "P", "transformer": ["diffusers", "X"]}')
    (base / "transformer" / "config.json").write_text("{}")
    (base / "LICENSE").write_text("terms")
    first = {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16(), "a.bias": torch.ones(2)}
    save_file(first, base / "transformer" / ONE, metadata={"format": "pt"})
    save_file({"b.weight": torch.ones(2, 2)}, base / "transformer" / TWO)
    state = {"a.lora_A.weight": torch.tensor([[1.0, 0.0]]), "a.lora_B.weight": torch.tensor([[0.5], [1.0]])}
    write_pipeline(state, 2.0, base, tmp_path / "out")
    merged = load_file(tmp_path / "out/transformer" / ONE)
    assert merged["a.weight"].dtype == torch.bfloat16
    assert merged["a.weight"].tolist() == [[2.0, 2.0], [5.0, 4.0]]
    assert merged["a.bias"].tolist() == [1.0, 1.0]
    assert load_file(tmp_path / "out/transformer" / TWO)["b.weight"].tolist() == [[1.0, 1.0]] * 2
    assert (tmp_path / "out/LICENSE").read_text() == "terms"
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(ModelError, match=r"has no safetensors weight of \['c'\]: another model"):
            write_pipeline({"c.lora_A.weight": torch.ones(1, 2)}, 2.0, base, out)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_base_whose_weights_cannot_be_used_as_they_are_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Added to quantised weights, an update would be rounded to them, and lack their scale."""
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.weight"] = state["proj_out.weight"].to(torch.float8_e4m3fn)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its transformer is quantised \(.*proj_out\.weight is F8_E4M3\)"):
        write_pipeline({}, 1.0, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_read_only_base_with_files_of_a_mac_beside_its_weights(
    run: Path, student: StableDiffusion3, tiny_pipeline: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    for stray in ("._diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        (base / "transformer" / stray).write_bytes(b"\0\5\x16\7 no weights")
    for path in sorted(base.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert main(["--run", str(run), "--base", str(base), "--format", "pipeline", "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "mine").touch()
    mode = (tmp_path / "mine").stat().st_mode
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in written} == {mode}
    assert [path.name for path in written if path.suffix == ".safetensors" and path.parent.name == "transformer"] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert_same_pictures(theirs(StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")), ours(student))


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    assert main(["--run", str(run), "--format", "pipeline", "--out", str(tmp_path)]) == 2
    assert "is there and not empty" in capsys.readouterr().err
    with pytest.raises(ModelError, match="a local diffusers directory is needed, name it with --base"):
        write_pipeline({}, 1.0, tmp_path / "absent", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "guidance", "expected"),
    [
        ("sd3", Guidance.CLASSIFIER_FREE, {"guidance_scale": "1.0", "max_sequence_length": "128"}),
        ("flux1", Guidance.INPUT, {"guidance_scale": "1.5", "max_sequence_length": "512"}),
        ("flux1", Guidance.NONE, {"guidance_scale": "1.0", "max_sequence_length": "512"}),
    ],
)
def test_the_recipe_samples_as_the_student_was_trained(
    tmp_path: Path, family: str, guidance: Guidance, expected: dict[str, str]
) -> None:
    values = tiny_config(tmp_path, tmp_path).model_dump(mode="json")
    values["backbone"] = {"family": family, "path": "m", "guidance_scale": 3.5}
    if family == "flux1":
        values["backbone"]["student_guidance"] = 1.5
    found = _call_options(Config.model_validate(values), guidance)
    assert found == {"sigmas": "[1, 0.75, 0.5, 0.25]"} | expected
