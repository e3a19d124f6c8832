"""Encodings that are kept: which are made anew, and that they are what was made."""

from __future__ import annotations

import torch

from common.backbones.base import Conditioning
from common.backbones.encoding_cache import EncodingCache

CPU = torch.device("cpu")


class Encoder:
    """Encodes a prompt as its length, in 8 bytes, and notes what it encoded."""

    def __init__(self, kept_bytes: int) -> None:
        self.encoded: list[str] = []
        self._cache = EncodingCache(CPU, kept_bytes)

    def __call__(self, text: str) -> list[float]:
        return self._cache.get(text, lambda: self._encode(text)).tensors["tokens"][0].tolist()

    def _encode(self, text: str) -> Conditioning:
        self.encoded.append(text)
        return Conditioning({"tokens": torch.tensor([[len(text), 0.5]])})


def test_a_prompt_is_encoded_once_while_there_is_room() -> None:
    encode = Encoder(kept_bytes=16)
    assert [encode(text) for text in ("a", "bb", "a", "bb")] == [[1, 0.5], [2, 0.5]] * 2
    assert encode.encoded == ["a", "bb"]


def test_the_one_that_was_not_used_for_longest_makes_room() -> None:
    encode = Encoder(kept_bytes=16)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        encode(text)
    assert encode.encoded == ["a", "bb", "ccc", "bb"]


def test_an_encoding_larger_than_the_room_is_made_each_time() -> None:
    encode = Encoder(kept_bytes=7)
    assert encode("a") == encode("a") == [1, 0.5]
    assert encode.encoded == ["a", "a"]


def test_a_change_of_an_encoding_changes_no_other() -> None:
    cache, made = EncodingCache(CPU), Conditioning({"tokens": torch.ones(1, 2)})
    for _ in range(3):
        encoding = cache.get("a", lambda: made)
        assert encoding.tensors["tokens"].tolist() == [[1, 1]]
        if encoding is not made:
            encoding.tensors["tokens"].zero_()
    made.tensors["tokens"].zero_()
    assert cache.get("a", lambda: made).tensors["tokens"].tolist() == [[1, 1]]
