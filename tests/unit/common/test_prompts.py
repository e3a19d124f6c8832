"""Prompt files: what is read, what is refused, and how the refusal is worded."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import PromptError
from common.prompts import load_prompts, prompts_fingerprint, prompts_of
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


def test_metadata_may_be_nested(tmp_path: Path) -> None:
    """As in the scores that `rtdmd evaluate` writes."""
    line = (
        '{"prompt": "a", "index": 3, "n": 1, "metadata": {"tag": "colors", "n": 1, "index": 7}, "scores": {"hps": [1]}}'
    )
    assert load_prompts(write(tmp_path, line, "a.jsonl")) == [Prompt(0, "a", {"n": 1, "tag": "colors", "index": 7})]
    path = write(tmp_path, '{"prompt": "a", "tag": "x", "metadata": {"tag": "y"}}', "b.jsonl")
    with pytest.raises(PromptError, match="line 1 has 'tag' twice"):
        load_prompts(path)


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
        ("a cat\r\ntwo dogs\r\n".encode("utf-16"), "line 1 begins as UTF-16 does: save the file as UTF-8"),
        (b"fine\n\0a\0\n", "line 2 has a NUL byte: this is a binary file or UTF-16"),
        ("fine\ncaf\xe9\n".encode("latin-1"), "line 2 is not UTF-8 (byte 3)"),
        # CESU-8, as some databases write it: the bytes of half of a surrogate pair.
        (b"fine\na cat \xed\xa0\xbc\n", "line 2 is not UTF-8 (byte 6)"),
        (b"a cat\rtwo dogs\r", "line 1 has a U+000D in it, which some programs read as the end of a line"),
        ("fine\na cat\u2028on a mat\n".encode(), "line 2 has a U+2028 in it"),
        (b"fine\ntwo\x0bdogs\x0c\r\n", "line 2 has a U+000B in it"),
        ("a\x85b".encode(), "line 1 has a U+0085 in it"),
        ("\ufeff\u200b \n".encode(), "no prompts in it"),
        (b"fine\na \x1b[1mred\x1b[0m cat\n", "line 2 has the control character U+001B"),
        (b"a bell \x07\n", "line 1 has the control character U+0007"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "fetch it with git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>\n", "line 2 begins as an HTML page does"),
        (b"{\\rtf1\\ansi a cat}\n", "line 1 begins as RTF does: save it as text"),
        (b'a cat\n{"prompt": "a dog"}\n', "line 2 is JSON, which only a file named .jsonl may hold"),
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
    for name in ("folder.jsonl", "folder.parquet", "folder"):
        (tmp_path / name).mkdir()
    for name in ("folder.txt", "folder.jsonl", "folder.parquet", "folder"):
        with pytest.raises(PromptError, match=rf"{name}: it is a directory: name a prompt file in it"):
            load_prompts(tmp_path / name)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("stem", "expected"), [("x" * 300, "no such prompt file|File name too long"), ("a\0b", "NUL")])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, stem: str, suffix: str, expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        load_prompts(tmp_path / (stem + suffix))


@pytest.mark.parametrize(
    ("name", "content"), [("a.TXT", "a cat"), ("a.JSONL", '{"prompt": "a cat"}'), ("a.Jsonl", '{"prompt": "a cat"}')]
)
def test_the_case_of_the_ending_does_not_matter(tmp_path: Path, name: str, content: str) -> None:
    assert load_prompts(write(tmp_path, content, name)) == [Prompt(0, "a cat")]


def test_marks_around_a_line_are_no_part_of_it(tmp_path: Path) -> None:
    # Two files with a byte-order mark, joined; a form feed between pages; a line that only looks blank.
    path = write(tmp_path, "\ufeffa cat\r\n\u200b\r\n\ufefftwo dogs\x0c\r\n")
    assert [prompt.text for prompt in load_prompts(path)] == ["a cat", "two dogs"]


def test_jsonl_may_have_line_separators_and_pairs_within_quotes(tmp_path: Path) -> None:
    path = write(
        tmp_path, '{"prompt": "a cat\u2028on \\ud83c\\udf89"}\r\n\r\n{"prompt": "two\x85dogs\\n"}\r\n', "p.jsonl"
    )
    assert [prompt.text for prompt in load_prompts(path)] == ["a cat\u2028on 🎉", "two\x85dogs"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r'{"prompt": "a cat with a party hat \ud83c"}', "half of a surrogate pair, character 24: it was cut inside"),
        (r'{"prompt": "a", "tag": "\udf89"}', "half of a surrogate pair, character 1"),
        (r'{"prompt": "a", "include": [{"class": "cup \ud83c"}]}', "'cup \\ud83c' has half of a surrogate pair"),
        (r'{"prompt": "a", "ke\ud800y": 1}', "half of a surrogate pair, character 3"),
        (r'{"prompt": "a\u0000b"}', "has the control character U+0000"),
        (r'{"prompt": "a\u001b[1mb"}', "line 2 has the control character U+001B"),
        ('{"prompt": "a", "share": NaN}', "is not JSON: NaN is no number of JSON: leave it out or write null"),
        ('{"prompt": "a", "share": [-Infinity]}', "is not JSON: -Infinity is no number of JSON"),
        ('{"prompt": "a", "share": 1e999}', "is not JSON: the number 1e999 is too large"),
        ('{"prompt": "a", "id": 18446744073709551616}', "has more than 64 bits: write it as text"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "is not JSON: the number 999999999999999999999999 has more"),
        ('{"prompt": "a", "deep": ' + "[" * 20 + "]" * 20 + "}", "nested deeper than 16 levels"),
        ('{"prompt": "a", "long": ' + json.dumps([0] * 20_000) + "}", "cannot be sent to a reward server"),
        ('{"prompt": "a"}\r{"prompt": "b"}', "has a U+000D in it"),
    ],
)
def test_what_is_no_text_or_no_value_is_refused_with_its_line(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path, f'{{"prompt": "fine"}}\n{line}\n', "prompts.jsonl")
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: line 2 ")
    assert expected in message
    # The message itself can be shown anywhere, on one line.
    assert (len(message.splitlines()), message.encode().decode()) == (1, message)


def test_large_numbers_and_empty_lists_travel(tmp_path: Path) -> None:
    about: dict[str, Any] = {"id": 2**64 - 1, "least": -(2**63), "share": 0.5, "deep": [[{"a": []}]]}
    path = write(tmp_path, json.dumps({"prompt": "a", **about}), "prompts.jsonl")
    assert load_prompts(path)[0].metadata == about


def test_prompts_of_a_command_line_are_checked_alike() -> None:
    assert prompts_of([" a cat ", "two dogs"], "--prompt") == [Prompt(0, "a cat"), Prompt(1, "two dogs")]
    for text, expected in (
        ("\u200b ", "--prompt is empty: say what to draw"),
        # What Python makes of an argument in Latin-1.
        (
            "caf\udce9",
            "--prompt 2 is not accepted by reward servers: the text 'caf\\udce9' has half of a surrogate pair",
        ),
        ("x" * 20_001, "--prompt 2 is a prompt of 20,001 characters"),
    ):
        with pytest.raises(PromptError) as caught:
            prompts_of(["fine", text], "--prompt")
        assert str(caught.value).startswith(expected)


def test_the_fingerprint_is_of_texts_and_metadata_in_their_order() -> None:
    first, second = Prompt(0, "a red circle", {"count": 1}), Prompt(1, "two squares")
    same = prompts_fingerprint([Prompt(7, "a red circle", {"count": 1}), Prompt(8, "two squares")])
    assert prompts_fingerprint([first, second]) == same
    others = [
        [second, first],
        [first],
        [replace(first, text="a red ring"), second],
        [replace(first, metadata={}), second],
    ]
    assert same not in {prompts_fingerprint(prompts) for prompts in others}
