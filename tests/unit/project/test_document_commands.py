"""The commands that the documents show: each is parsed by the real parser of its tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.document_commands import PROJECT_ROOT, Shown, problem, shown_commands
from tests.unit.project.test_documents import DOCUMENTS, HISTORY

SHOWN = [command for path in DOCUMENTS if path != HISTORY for command in shown_commands(path)]


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_every_command_is_one_that_its_tool_takes(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    assert problem(shown, monkeypatch) is None


def test_most_commands_are_found() -> None:
    assert len(SHOWN) > 60
    assert {shown.words[0] for shown in SHOWN} == {"rtdmd", "python", "make"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("    rtdmd generate --run DIR --prompt a --out DIR --speed 3", "unrecognized arguments: --speed 3"),
        ("    rtdmd generate --run DIR --out DIR", "one of the arguments --prompt --prompts is required"),
        ("    rtdmd export --run DIR --format onnx|lora --out DIR", "invalid choice: 'onnx'"),
        ("Use `rtdmd convert hbs`.", "invalid choice: 'hbs'"),
        ("    rtdmd trane", "rtdmd has no command trane"),
        ("    rtdmd train --config my_run.yaml --run.sed 3", "run.sed"),
        ("    ray job submit --working-dir . -- python learner/main.py --resum", "--resum"),
        ("    make everything", "make knows no everything"),
        ("    make demo FLAGS=--quick", "make knows no FLAGS=--quick"),
        ("    python -m benchmarks.reward_serving empty", "invalid choice: 'empty'"),
        ("    python benchmarks/seeds.py \\\n      --sead 3", "unrecognized arguments: --sead 3"),
        ("    python benchmarks/gone.py", "benchmarks/gone.py is no file"),
        ("    python -m benchmarks.gone", "there is no module benchmarks.gone"),
    ],
)
def test_a_wrong_command_would_be_found(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    page = PROJECT_ROOT / "docs/index.md"
    original = Path.read_text

    def read(path: Path, **options: str) -> str:
        return text if path == page else original(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read)
        (shown,) = shown_commands(page)
    assert reason in (problem(shown, monkeypatch) or "")
