"""Pictures of a trained run: those of its own evaluations, whoever asks for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError
from common.policies import few_step_teacher_spec, policy_spec, student_spec, teacher_spec
from common.types import ByteArray, Prompt
from learner.tools import generate
from rollout_workers.sampler import sample_pictures
from tests.helpers.trained_run import PROMPTS, tiny_config, write_trained_run

COUNT_TWO = ("--count", "2", "--device", "cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "run"
    write_trained_run(directory, tiny_pipeline)
    return directory


def pictures(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, ByteArray]:
    """File name -> picture, of the paths that were printed."""
    assert generate.main(options) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    return {path.name: np.array(Image.open(path)) for path in paths}


def test_pictures_are_those_of_a_worker_s_evaluation(
    run: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pictures(
        capsys, "--run", str(run), "--prompts", str(run / "prompts.txt"), *COUNT_TWO, "--out", str(tmp_path)
    )
    backbone = write_trained_run(tmp_path / "other", tiny_pipeline)
    config, empty = tiny_config(tiny_pipeline, run), backbone.encode_prompts([""])
    for index, text in enumerate(PROMPTS):
        prompt = Prompt(index, text)
        expected = sample_pictures(backbone, prompt, student_spec(config), seed=3, count=2, empty=empty)
        assert np.array_equal(found[f"{index:04d}-00.png"], expected[0])
        assert np.array_equal(found[f"{index:04d}-01.png"], expected[1])
    assert len(found) == 4


def test_prompts_of_the_command_line_are_keyed_by_their_place(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--run", str(run), *COUNT_TWO)
    from_file = pictures(capsys, *common, "--prompts", str(run / "prompts.txt"), "--out", str(tmp_path / "a"))
    texts = [word for text in PROMPTS for word in ("--prompt", text)]
    from_line = pictures(capsys, *common, *texts, "--out", str(tmp_path / "b"))
    other_seed = pictures(capsys, *common, *texts, "--seed", "4", "--out", str(tmp_path / "c"))
    assert from_file.keys() == from_line.keys() == other_seed.keys()
    assert all(np.array_equal(from_line[name], picture) for name, picture in from_file.items())
    assert not any(np.array_equal(other_seed[name], picture) for name, picture in from_file.items())


def test_policies_and_steps_make_other_pictures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--run", str(run), "--prompt", "red circle", "--device", "cpu", "--out", str(tmp_path))
    variants = [
        (),
        ("--policy", "cold_start"),
        ("--policy", "teacher"),
        ("--policy", "teacher", "--steps", "4"),
        ("--policy", "teacher", "--guidance", "1"),
    ]
    seen = [pictures(capsys, *common, *options)["0000-00.png"].tobytes() for options in variants]
    assert len(set(seen)) == len(variants)


def test_each_policy_samples_as_the_run_evaluates_it(tiny_pipeline: Path) -> None:
    config = tiny_config(tiny_pipeline, tiny_pipeline)
    assert policy_spec(config, "rtdmd", None, None) == policy_spec(config, "cold_start", None, None)
    assert policy_spec(config, "rtdmd", None, None) == student_spec(config)
    assert policy_spec(config, "teacher", None, None) == teacher_spec(config)
    assert (teacher_spec(config).num_steps, teacher_spec(config).guidance) == (6, 3.0)
    assert policy_spec(config, "teacher", 4, 1.0) == few_step_teacher_spec(config)
    with pytest.raises(
        ConfigError, match=r"--guidance 2 with --policy rtdmd: the student was trained without guidance"
    ):
        policy_spec(config, "rtdmd", None, 2.0)
    with pytest.raises(ConfigError, match="--guidance 0: a guidance scale is at least 1"):
        policy_spec(config, "teacher", None, 0.0)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--prompt", " "), 2, "error: --prompt is empty: say what to draw"),
        (("--prompts", "absent.txt"), 2, "error: absent.txt: no such prompt file"),
        (("--prompt", "a", "--guidance", "2"), 2, "error: --guidance 2 with --policy rtdmd"),
        (("--prompt", "a", "--base", "nowhere"), 2, "error: no pipeline at nowhere"),
        (("--prompt", "a", "--device", "gpu"), 2, "error: --device gpu cannot be used: "),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_a_line(
    run: Path, options: tuple[str, ...], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--run", str(run), *options, "--out", str(tmp_path)]) == status
    assert capsys.readouterr().err.startswith(message)
