"""Tokenizers of the shapes world: words and phrases are single tokens."""

from __future__ import annotations

from pathlib import Path

from zoo.world.tokenizers import MAX_PHRASES, MAX_TOKENS, PHRASES, WORDS, clip_tokenizer, t5_tokenizer

LONGEST = "small red circle left of big blue square and right of small green triangle on white"


def test_words_and_phrases_are_single_tokens_and_the_longest_caption_fits(tmp_path: Path) -> None:
    clip, t5 = clip_tokenizer(tmp_path), t5_tokenizer()
    assert all(len(clip.tokenize(word)) == 1 for word in WORDS)
    assert all(len(t5.tokenize(phrase)) == 1 for phrase in PHRASES)
    assert len(clip(LONGEST).input_ids) <= MAX_TOKENS
    assert len(t5(LONGEST).input_ids) <= MAX_PHRASES
