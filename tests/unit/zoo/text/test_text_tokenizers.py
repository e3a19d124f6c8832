"""Tokenizers of the text world: letters are tokens, the rest is three phrases."""

from __future__ import annotations

import itertools
from pathlib import Path

from transformers import CLIPTokenizer

from common.backbones.plain_text import make_special_tokens_plain_text
from zoo.text.captions import sample_requests
from zoo.text.tokenizers import MAX_PIECES, MAX_TOKENS, text_clip_tokenizer, text_t5_tokenizer

CAPTION = 'the word "CATER" in red on white in the middle'


def test_every_letter_is_a_token_and_the_longest_caption_fits() -> None:
    clip, t5 = text_clip_tokenizer(), text_t5_tokenizer()
    assert clip.convert_ids_to_tokens(clip(CAPTION).input_ids) == [
        "<|startoftext|>",
        'the word "',
        *"cate",
        "r</w>",
        '" in red on white',
        " in the middle",
        "<|endoftext|>",
    ]
    assert t5.convert_ids_to_tokens(t5(CAPTION).input_ids) == [
        '▁the▁word▁"',
        *"CATER",
        '"▁in▁red▁on▁white',
        "▁in▁the▁middle",
        "</s>",
    ]
    assert len(clip(CAPTION).input_ids) == MAX_TOKENS == clip.model_max_length
    assert len(t5(CAPTION).input_ids) == MAX_PIECES == t5.model_max_length


def test_captions_differ_wherever_their_tokens_do() -> None:
    captions = {request.caption for request in sample_requests(500, seed=1)}
    for tokenizer in (text_clip_tokenizer(), text_t5_tokenizer()):
        assert len({tuple(tokenizer(caption).input_ids) for caption in captions}) == len(captions)


def test_a_word_is_never_taken_for_a_phrase() -> None:
    clip = text_clip_tokenizer()
    for letters in itertools.product("THE", repeat=3):
        tokens = clip.tokenize("".join(letters))
        assert [token[0] for token in tokens] == [letter.lower() for letter in letters]


def test_a_saved_tokenizer_and_one_made_ready_for_prompts_give_the_same_tokens(tmp_path: Path) -> None:
    clip, t5 = text_clip_tokenizer(), text_t5_tokenizer()
    before = clip(CAPTION).input_ids, t5(CAPTION).input_ids
    clip.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == MAX_TOKENS
    make_special_tokens_plain_text(loaded)
    make_special_tokens_plain_text(t5)
    assert (loaded(CAPTION).input_ids, t5(CAPTION).input_ids) == before
