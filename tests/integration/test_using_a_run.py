"""The commands that use a run, on a run that a person made: real Ray, real reward servers.

One test starts its command in a process of its own, as a person does. The others call it in this process, since a new
one spends more time on imports than on the command.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from common.types import ByteArray
from learner.commands import COMMANDS
from tests.helpers.running_service import PROJECT_ROOT, PROMPTS, Run, Service

EVALUATED = PROMPTS[:6]
IMAGES = 4
TIMEOUT = 280.0


@pytest.fixture(scope="module")
def prompts(config: Path) -> Path:
    """The prompts of the final evaluation: the first of all."""
    path = config.parent / "evaluated.txt"
    path.write_text("\n".join(EVALUATED) + "\n")
    return path


@pytest.fixture
def bright(service: Service) -> str:
    """The URL of a running server."""
    return service.reward_urls["bright"]


class Told(NamedTuple):
    """The output of a command."""

    stdout: str
    stderr: str


def process(name: str, *options: str | Path) -> Told:
    """A command in a process of its own."""
    line = [sys.executable, "-m", "learner.commands", name, *map(str, options)]
    found = subprocess.run(line, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return Told(found.stdout, found.stderr)


def command(name: str, *options: str | Path, status: int = 0) -> Told:
    """A command in this process."""
    module, _, function = COMMANDS[name][0].partition(":")
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        found = vars(import_module(module))[function](list(map(str, options)))
    told = Told(stdout.getvalue(), stderr.getvalue())
    assert found == status, told
    return told


def picture(path: Path | str) -> ByteArray:
    return np.array(Image.open(path))


def mean(lines: Path, reward: str) -> float:
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["prompt"] for record in records] == list(EVALUATED)
    return float(np.mean([record["scores"][reward] for record in records]))


def test_pictures_are_those_of_the_run_s_own_evaluation(finished: Run, prompts: Path, tmp_path: Path) -> None:
    for policy in ("rtdmd", "cold_start"):
        options = (
            "--run",
            finished.run_dir,
            "--prompts",
            prompts,
            "--count",
            str(IMAGES),
            "--policy",
            policy,
            "--device",
            "cpu",
        )
        start = process if policy == "rtdmd" else command
        paths = start("generate", *options, "--out", tmp_path / policy).stdout.splitlines()
        assert len(paths) == len(EVALUATED) * IMAGES
        for place in range(2):
            kept = finished.run_dir / "samples" / "policies" / f"{policy}-{place:02d}.png"
            # Equal up to rounding: a worker samples several prompts in one pass.
            assert np.abs(picture(paths[place * IMAGES]).astype(int) - picture(kept)).max() <= 1


def test_scores_are_those_of_the_run_s_own_evaluation(
    finished: Run, prompts: Path, bright: str, tmp_path: Path
) -> None:
    hps = prompts.parent / "hps"
    options = ("--run", finished.run_dir, "--prompts", prompts, "--images-per-prompt", str(IMAGES), "--device", "cpu")
    rewards = ("--reward", f"bright={bright}", "--scorer", f"hps=hps,{hps}")
    found = command("evaluate", *options, *rewards, "--out", tmp_path)
    assert found.stdout == f"{tmp_path / 'evaluation.md'}\n"
    summary = json.loads((finished.run_dir / "summary.json").read_text())["policies"]["rtdmd"]
    lines = (tmp_path / "evaluation.md").read_text().splitlines()
    assert lines[4] == "|  | HPSv2 | bright |"
    for name, cell in zip(("hps", "bright"), lines[6].split(" | ")[1:], strict=True):
        assert mean(tmp_path / "scores.jsonl", name) == pytest.approx(summary[name], abs=1e-6)
        assert cell.startswith(f"{summary[name]:.4f} ± ")
    assert picture(tmp_path / "grid.png").ndim == 3
    assert "![The first prompts and their pictures](grid.png)" in lines


def test_a_merged_pipeline_is_scored_with_the_server_s_own_rules(
    finished: Run, prompts: Path, bright: str, tmp_path: Path
) -> None:
    """As it is, exported, loaded by diffusers, scored; and a reward that is not there ends it by name."""
    told = command("export", "--run", finished.run_dir, "--format", "pipeline", "--out", tmp_path / "merged").stdout
    assert "pipeline(prompt, sigmas=[1, 0.75, 0.5, 0.25], guidance_scale=1.0, max_sequence_length=10)" in told
    call = ("--call", "sigmas=[1, 0.75, 0.5, 0.25]", "--call", "guidance_scale=1.0", "--call", "max_sequence_length=10")
    size = ("--call", "height=16", "--call", "width=16")
    options = ("--pipeline", tmp_path / "merged", "--prompts", prompts, "--images-per-prompt", "2", "--device", "cpu")
    command("evaluate", *options, *call, *size, "--reward", f"bright={bright}", "--out", tmp_path / "scores")
    assert 0 < mean(tmp_path / "scores" / "scores.jsonl", "bright") < 1
    assert "| merged | " in (tmp_path / "scores" / "evaluation.md").read_text()
    failed = command("evaluate", *options, "--reward", "gone=http://127.0.0.1:9", "--out", tmp_path / "no", status=1)
    assert failed.stderr.startswith("error: reward gone")
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "no" / "evaluation.md").exists()


def test_a_score_that_cannot_be_had_is_an_error_not_a_zero(finished: Run, tmp_path: Path) -> None:
    """The scorer answers the first prompts and fails at the last."""
    (tmp_path / "prompts.txt").write_text("red\nraise\n")
    options = (
        "--run",
        finished.run_dir,
        "--prompts",
        tmp_path / "prompts.txt",
        "--images-per-prompt",
        "1",
        "--device",
        "cpu",
    )
    scorer = ("--scorer", "mischief=tests.helpers.toy_scorers:MischiefScorer")
    failed = command("evaluate", *options, *scorer, "--out", tmp_path / "out", status=1)
    assert "error: reward mischief" in failed.stderr
    assert not (tmp_path / "out" / "evaluation.md").exists()
    assert len((tmp_path / "out" / "scores.partial.jsonl").read_text().splitlines()) == 1
