"""A prompt that is no text is refused by every command that reads prompts, before it starts anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from common.config.run import Config
from common.errors import ConfigError
from common.types import Prompt, PromptSets
from learner import main
from learner.preflight.checks import check_requests
from learner.tools import evaluate, generate

CUT = r'{"prompt": "a cat with a party hat \ud83c"}'


def prompts(folder: Path, kind: str) -> Path:
    path = folder / f"prompts.{kind}"
    if kind == "jsonl":
        path.write_text(f'{{"prompt": "fine"}}\n{CUT}\n', encoding="utf-8")
    elif kind == "txt":
        path.write_bytes(b"fine\na cat\xed\xa0\xbc\n")
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"prompt": ["fine", "a"], "metadata": [None, CUT]}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("command", "options"),
    [
        (main.main, ("--config", "deploy/runs/shapes.yaml", "--prompts.train", "FILE", "--run-dir", "OUT")),
        (main.main, ("--config", "deploy/runs/shapes.yaml", "--prompts.evaluation", "FILE", "--run-dir", "OUT")),
        (main.main, ("--config", "deploy/runs/shapes.yaml", "--prompts.cold_start", "FILE", "--run-dir", "OUT")),
        (main.main, ("--config", "deploy/runs/shapes.yaml", "--prompts.train", "FILE", "--dry-run")),
        (main.forecast, ("--config", "deploy/runs/shapes.yaml", "--prompts.train", "FILE")),
        (generate.main, ("--run", "OUT", "--prompts", "FILE", "--out", "OUT")),
        (evaluate.main, ("--run", "OUT", "--prompts", "FILE", "--out", "OUT", "--reward", "hps=http://127.0.0.1:1")),
    ],
)
def test_every_command_names_the_file_and_the_line(
    command: Callable[[list[str]], int],
    options: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = prompts(tmp_path, kind), tmp_path / "out"
    words = {"FILE": str(path), "OUT": str(out)}
    assert command([words.get(option, option) for option in options]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {path}: {'row' if kind == 'parquet' else 'line'} 2 ")
    assert (out.exists(), ray.is_initialized()) == (False, False)


def test_the_prompt_of_a_command_line_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert generate.main(["--run", str(out), "--prompt", "caf\udce9", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --prompt 1 is not accepted by reward servers: the text 'caf\\udce9' has half of a")
    assert not out.exists()


def test_metadata_must_fit_into_the_request_of_a_group() -> None:
    config = Config.model_validate(
        {
            "run": {"name": "test"},
            "backbone": {"path": "model"},
            "prompts": {"train": "a.txt", "evaluation": "b.txt"},
            "alignment": {"group_size": 16},
            "rewards": [{"name": "unasked", "url": "http://x", "differentiable": True}],
        }
    )
    fine = [Prompt(0, "a cat", {"long": ["x" * 30_000] * 2})]
    check_requests(config, PromptSets(cold_start=fine, alignment=fine, evaluation=fine))
    # Three times 30 000 bytes for each of 16 images are more than a mebibyte; for the 2 of an evaluation they are not.
    long = [Prompt(0, "a cat", {"long": ["x" * 30_000] * 3})]
    check_requests(config, PromptSets(cold_start=long, alignment=fine, evaluation=long))
    with pytest.raises(ConfigError, match="shorten its metadata") as caught:
        check_requests(config, PromptSets(cold_start=fine, alignment=long, evaluation=fine))
    assert str(caught.value).startswith(
        "a.txt: the prompt 'a cat' and its metadata are sent once for each image; with "
    )
    assert "alignment.group_size = 16" in str(caught.value)
