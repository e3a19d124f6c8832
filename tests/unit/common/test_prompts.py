"""Prompt files: what is read, what is refused, and how the refusal is worded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from common.errors import PromptError
from common.prompts import load_prompts
from common.types import Prompt


def write(tmp_path: Path, content: bytes | str, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_lines_are_counted_without_the_blank_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffa red circle\r\n\n  \n two dogs, 日本 \n")
    assert load_prompts(path) == [Prompt(0, "a red circle"), Prompt(1, "two dogs, 日本")]


def test_jsonl_carries_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a cat", "count": 1}\n\n{"prompt": "b"}\n', "prompts.jsonl")
    prompts = load_prompts(path)
    assert [prompt.text for prompt in prompts] == ["a cat", "b"]
    assert prompts[0].metadata == {"count": 1}
    assert prompts[1].index == 1


def test_special_tokens_are_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a <|endoftext|> cat</s>\n")
    assert load_prompts(path)[0].text == "a <|endoftext|> cat</s>"


def test_a_long_prompt_is_accepted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "short\n" + "x" * 10_000 + "\n")
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(path)
    assert len(prompts[1].text) == 10_000
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: line 2 has 10000 characters; the text encoder reads only its first tokens"
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no prompts in it"),
        (b" \n\n", "no prompts in it"),
        (b"fine\na\0b\n", "line 2 has a NUL byte"),
        (b"\x89PNG\r\n\x1a\n", "line 1 is not UTF-8 (byte 0)"),
        ("東".encode() * 15_000, "line 1 is not accepted by reward servers: the text '東東東"),
        (b"x" * 20_001, "line 1 is a prompt of 20,001 characters, the limit is 20,000"),
        (b"fine\n" + b"x" * 10_000_000, "line 2 is longer than 1,000,000 bytes (the file has 10,000,005)"),
    ],
)
def test_what_is_no_prompt_list_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"prompt": 3}', '{"prompt": " "}', '"text"', "[" * 100_000])
def test_jsonl_lines_without_a_prompt_are_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f'{{"prompt": "fine"}}\n{line}\n', "prompts.jsonl")
    with pytest.raises(PromptError, match="line 2"):
        load_prompts(path)


def test_missing_files_directories_and_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such prompt file"):
        load_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptError, match=r"is \.txt, \.jsonl or \.parquet, not \.csv"):
        load_prompts(write(tmp_path, "a", "prompts.csv"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(tmp_path / "folder.txt")
