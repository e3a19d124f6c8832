"""Tokenizers of the text world: every letter of the word is one token, so words that were never seen can be drawn.

Everything else of a caption is three phrases, one token each: fewer tokens make a cheaper transformer.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from transformers import AddedToken, CLIPTokenizer, PreTrainedTokenizerFast

from zoo.text.captions import LETTERS, LONGEST, PLACES
from zoo.world.scenes import BACKGROUNDS, COLOURS
from zoo.world.tokenizers import FOREIGN_LETTERS, clip_tokenizer, t5_tokenizer

MAX_TOKENS = LONGEST + 5
"""Letters, three phrases, the start and the end token."""
MAX_PIECES = LONGEST + 4
"""Letters, three phrases and the end token."""
OPENING = 'the word "'
COLOURINGS = tuple(f'" in {colour} on {background}' for colour, background in itertools.product(COLOURS, BACKGROUNDS))
PHRASES = (OPENING, *COLOURINGS, *(f" {place}" for place in PLACES))


def text_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges, with the phrases as added tokens.

    CLIP lowers all letters, but an added token is found before that. So no letter of a word is taken for a phrase.
    """
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = clip_tokenizer(Path(directory), MAX_TOKENS, words=())
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return tokenizer


def text_t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's for captions of the text world; other text becomes letters."""
    phrases = ["▁" + OPENING, *PHRASES[1:]]
    pieces = [(phrase.replace(" ", "▁"), -2.0) for phrase in phrases]
    pieces += [(letter, -4.0) for letter in LETTERS]
    pieces += [(letter, -8.0) for letter in FOREIGN_LETTERS + '"']
    return t5_tokenizer(MAX_PIECES, pieces)
