"""Files that are no weights are refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import ModelError
from zoo.half_weights import load_full, save_half


def test_weights_are_read_back_as_float32(tmp_path: Path) -> None:
    save_half({"a": torch.tensor([0.5, 1 / 3]), "n": torch.tensor([7])}, tmp_path / "w")
    found = load_full(tmp_path / "w")
    assert found["a"].dtype is torch.float32
    assert found["a"].tolist() == pytest.approx([0.5, 1 / 3], rel=2**-10)
    assert found["n"].tolist() == [7]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer.*git lfs pull"),
        (b"\x08\0\0\0\0\0\0\0{", r"truncated or corrupt.*python -m zoo\.build"),
        (None, r"no weights at .*python -m zoo\.build"),
    ],
)
def test_what_is_not_the_weights_is_named(tmp_path: Path, content: bytes | None, remedy: str) -> None:
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(ModelError, match=remedy):
        load_full(tmp_path / "w")
