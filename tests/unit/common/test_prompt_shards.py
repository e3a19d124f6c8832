"""Datasets that were cut into several prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import PromptError
from common.prompts import load_prompts


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(f"prompt of {name}\n")


def test_the_shards_of_a_directory_are_read_in_their_order(tmp_path: Path) -> None:
    names = [f"train-{number:05d}-of-00003.txt" for number in range(3)]
    write(tmp_path, *reversed(names), "README.md")
    prompts = load_prompts(tmp_path)
    assert [prompt.text for prompt in prompts] == [f"prompt of {name}" for name in names]
    assert [prompt.index for prompt in prompts] == [0, 1, 2]


def test_one_shard_of_several_is_a_warning_and_the_only_one_of_a_dataset_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "train-00001-of-00002.txt", "test-00000-of-00001.txt")
    for name in ("train-00001-of-00002.txt", "test-00000-of-00001.txt"):
        assert [prompt.text for prompt in load_prompts(tmp_path / name)] == [f"prompt of {name}"]
    (warning,) = caplog.messages
    assert (
        warning
        == f"{tmp_path}/train-00001-of-00002.txt is one of 2 files of a dataset: name their directory to use all"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "it is a directory: name a prompt file in it"),
        (("train.txt", "evaluation.txt"), "it is a directory: name a prompt file in it"),
        (("a-00000-of-00001.txt", "b-00000-of-00001.txt"), "several datasets, a, b: put those of one into a directory"),
        (("a-00000-of-00003.txt", "a-00002-of-00003.txt"), "2 of the 3 files of a: number 1 is missing"),
    ],
)
def test_a_directory_without_one_whole_dataset_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write(tmp_path, *names)
    with pytest.raises(PromptError, match=message):
        load_prompts(tmp_path)
