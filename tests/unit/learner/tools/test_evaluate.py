"""The command that evaluates: what it asks for, what it refuses, and that no score is made up."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.run import Config
from common.errors import ConfigError, ModelError, RewardRejected
from common.rewards.client import RewardEndpoint
from common.types import Prompt
from learner.driver.local_servers import LocalServerSpec
from learner.records.pictures import SMALLEST_WIDTH, captioned_grid
from learner.tools import evaluate
from learner.tools.diffusers_pipeline import PipelinePictures
from learner.tools.scoring import choose
from tests.helpers.trained_run import tiny_config

FEW = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 10}


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> PipelinePictures:
    return PipelinePictures(tiny_pipeline, FEW, "cpu", torch.float32)


@pytest.mark.usefixtures("one_thread")
def test_noise_of_a_pipeline_is_keyed_by_seed_prompt_and_sample(pipeline: PipelinePictures) -> None:
    first = pipeline.pictures(Prompt(0, "red"), seed=0, count=2)
    assert first.shape == (2, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, pipeline.pictures(Prompt(0, "red"), seed=0, count=2))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, pipeline.pictures(Prompt(1, "red"), seed=0, count=2))
    assert not np.array_equal(first, pipeline.pictures(Prompt(0, "red"), seed=1, count=2))


def test_a_pipeline_s_call_takes_its_own_arguments_alone(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--call stepps: StableDiffusion3Pipeline takes .*num_inference_steps"):
        PipelinePictures(tiny_pipeline, {"stepps": 2}, "cpu", torch.float32)
    with pytest.raises(ConfigError, match="--call generator"):
        PipelinePictures(tiny_pipeline, {"generator": None}, "cpu", torch.float32)
    with pytest.raises(ModelError, match="expected a diffusers directory"):
        PipelinePictures(tmp_path, {}, "cpu", torch.float32)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the pipeline at"):
        PipelinePictures(tmp_path, {}, "cpu", torch.float32)


def test_servers_are_named_by_url_or_started() -> None:
    choice = choose(["b=http://x:1", "a=http://y:2", "b=http://x:3"], ["c=ocr", "d=my.module:Scorer,models/d"], None)
    assert choice.order == ("b", "a", "c", "d")
    assert choice.endpoints[2] == RewardEndpoint("b", "http://x:3")
    assert choice.local == (
        LocalServerSpec("c", "ocr", None),
        LocalServerSpec("d", "my.module:Scorer", Path("models/d")),
    )


def test_without_any_the_rewards_are_the_run_s(tiny_pipeline: Path) -> None:
    config = tiny_config(tiny_pipeline, tiny_pipeline)
    assert choose([], [], config).local == (
        LocalServerSpec("bright", "tests.helpers.toy_scorers:BrightnessScorer", None),
    )
    assert choose(["a=http://x"], [], config).order == ("a",)
    found = Config.model_validate(
        config.model_dump()
        | {"rewards": [{"name": "hps", "url": "redis", "differentiable": True}], "redis": {"url": "redis://h:1/0"}}
    )
    with pytest.raises(ConfigError, match="found its reward hps through Redis: name its server"):
        choose([], [], found)


@pytest.mark.parametrize(
    ("rewards", "scorers", "expected"),
    [
        ([], [], "no reward: name servers with --reward"),
        (["hps"], [], "--reward hps: write --reward NAME=URL"),
        (["hps=host:1"], [], "--reward hps=host:1: not an http"),
        (["a=http://x"], ["a=ocr"], "a name is used twice"),
        ([], ["a=ocr", "a=hps,dir"], "a name is used twice"),
        ([], ["=ocr"], "--scorer =ocr: write"),
    ],
)
def test_rewards_that_mean_nothing_are_refused(rewards: list[str], scorers: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        choose(rewards, scorers, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--run", "r", "--call", "num_inference_steps=2"), "--call does not fit --run"),
        (
            ("--pipeline", "p", "--steps", "2"),
            "--steps does not fit --pipeline: its steps are --call num_inference_steps",
        ),
        (("--pipeline", "p"), "no reward: name servers"),
        (("--run", "r"), "r is not the directory of a run"),
        (("--run", "r", "--device", "gpu"), "error: --device gpu cannot be used: "),
        (("--pipeline", "p", "--device", "cuda:99"), "error: --device cuda:99 cannot be used: "),
        (("--pipeline", "p", "--device", "meta"), "error: --device meta cannot be used: "),
    ],
)
def test_options_without_use_are_refused_before_anything_starts(
    options: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    assert evaluate.main([*options, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_grid_has_a_row_a_prompt_and_small_pictures_are_enlarged() -> None:
    red, blue = (np.full((2, 16, 16, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    grid = captioned_grid([("a red square", red), ("a very long prompt " * 40, blue)])
    assert grid.size == (SMALLEST_WIDTH, 2 * (20 + 128 + 4))
    assert grid.getpixel((10, 30)) == (255, 0, 0)
    assert grid.getpixel((10, 152 + 30)) == (0, 0, 255)
    assert captioned_grid([("a", np.zeros((3, 1024, 512, 3), np.uint8))]).size == (3 * 260, 20 + 512 + 4)


@pytest.mark.parametrize("text", ["blurry #1, low quality", "no", "a: b", "3 cats", "~"])
def test_text_of_a_call_is_what_was_typed(text: str) -> None:
    assert evaluate._call_options([f"negative_prompt={text}"]) == {"negative_prompt": text}


@pytest.mark.parametrize("text", ["True", "None", "[a, b]", ".5", "010", "nan"])
def test_what_is_nearly_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--call x: .* is not JSON: "):
        evaluate._call_options([f"x={text}"])


def test_options_of_a_call_are_json() -> None:
    assert evaluate._call_options(["sigmas=[1, 0.5]", "guidance_scale=1.0", "negative_prompt=blurry"]) == {
        "sigmas": [1, 0.5],
        "guidance_scale": 1.0,
        "negative_prompt": "blurry",
    }
    with pytest.raises(ConfigError, match="--call steps: write --call NAME=VALUE"):
        evaluate._call_options(["steps"])


class Rewards:
    """Scores each picture 1.0, but refuses a prompt that contains `bad`."""

    def introduce(self, _path: Path, _prompts: list[Prompt]) -> dict[str, object]:
        return {}

    def score(self, prompt: Prompt, images_GHWC: np.ndarray) -> dict[str, np.ndarray]:
        if "bad" in prompt.text:
            raise RewardRejected("gold", "request", "no caption")
        return {"gold": np.ones(len(images_GHWC), np.float32)}


def test_an_earlier_evaluation_stays_whole_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.zeros((2, 8, 8, 3), np.uint8)
    monkeypatch.setattr(evaluate, "started", lambda *_: nullcontext(Rewards()))
    monkeypatch.setattr(evaluate, "_pipeline", lambda _: evaluate.Subject("tiny", "1 step", lambda _: picture))
    out, file = tmp_path / "scores", tmp_path / "prompts.txt"
    options = [
        "--pipeline",
        str(tmp_path),
        "--prompts",
        str(file),
        "--reward",
        "gold=http://127.0.0.1:1",
        "--out",
        str(out),
    ]
    file.write_text("one\ntwo\n")
    assert evaluate.main(options) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert sorted(before) == ["evaluation.md", "grid.png", "scores.jsonl"]
    file.write_text("three\nbad\n")
    assert evaluate.main(options) == 1
    partial = (out / "scores.partial.jsonl").read_text()
    assert [json.loads(line)["prompt"] for line in partial.splitlines()] == ["three"]
    assert {name: (out / name).read_bytes() for name in before} == before
