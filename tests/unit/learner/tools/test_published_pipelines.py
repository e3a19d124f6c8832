"""Pipelines as people publish them, through every tool: without T5, and in half-precision copies alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from common.errors import ModelError
from common.types import Prompt
from learner.tools import export, generate
from learner.tools.diffusers_pipeline import PipelinePictures
from tests.helpers.trained_run import write_trained_run

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
CALL = {"sigmas": [1, 0.75, 0.5, 0.25], "height": 16, "width": 16, "max_sequence_length": 10, "guidance_scale": 1.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def published(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "pipeline"
    StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, **NO_T5).save_pretrained(path, variant="fp16")
    return path


def test_a_run_on_it_generates_and_its_exports_load_as_they_say(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trained_run(tmp_path / "run", published)
    run = ["--run", str(tmp_path / "run"), "--out"]
    assert generate.main([*run, str(tmp_path / "pictures"), "--prompt", "red circle", "--device", "cpu"]) == 0
    assert (tmp_path / "pictures" / "0000-00.png").is_file()
    capsys.readouterr()
    options = "dtype=torch.float32, text_encoder_3=None, tokenizer_3=None, variant='fp16'"
    pictures = []
    for kind in ("pipeline", "lora"):
        assert export.main([*run, str(tmp_path / kind), "--format", kind]) == 0
        base = tmp_path / "pipeline" if kind == "pipeline" else published
        assert f'from_pretrained("{base}", {options})' in capsys.readouterr().out
        pipeline = StableDiffusion3Pipeline.from_pretrained(base, dtype=torch.float32, variant="fp16", **NO_T5)
        if kind == "lora":
            pipeline.load_lora_weights(tmp_path / kind)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pictures.append(pipeline("red circle", latents=noise, output_type="np", **CALL).images)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1e-4


def test_evaluate_samples_it_as_diffusers_does(published: Path) -> None:
    ours = PipelinePictures(published, CALL, "cpu", torch.float32)
    theirs = StableDiffusion3Pipeline.from_pretrained(published, dtype=torch.float32, variant="fp16", **NO_T5)
    expected = PipelinePictures.__new__(PipelinePictures)
    expected._pipeline, expected._options = theirs, CALL
    prompt = Prompt(0, "red circle")
    assert np.array_equal(ours.pictures(prompt, 0, 2), expected.pictures(prompt, 0, 2))


def test_evaluate_names_what_cannot_be_left_out(tiny_pipeline: Path, tmp_path: Path) -> None:
    StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder=None).save_pretrained(tmp_path / "p")
    expected = r"leaves out text_encoder, and a StableDiffusion3Pipeline cannot sample without: save the pipeline again"
    with pytest.raises(ModelError, match=expected):
        PipelinePictures(tmp_path / "p", {}, "cpu", torch.float32)


def test_evaluate_names_a_pipeline_that_needs_more_than_a_prompt(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "p")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Img2ImgPipeline"}))
    pipeline = PipelinePictures(path, {"num_inference_steps": 2}, "cpu", torch.float32)
    expected = f"the StableDiffusion3Img2ImgPipeline at {path} cannot sample from a prompt with these --call options: "
    with pytest.raises(ModelError, match=expected):
        pipeline.pictures(Prompt(0, "red circle"), 0, 1)
