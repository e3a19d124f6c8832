"""Tokenizers whose vocabulary is the shapes world's; other text becomes bytes or letters.

CLIP's has one token per word. T5's and Qwen's have one token per phrase ("small red circle", "and left of", "on
white"): fewer tokens make a cheaper transformer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from zoo.world.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 18
"""The longest caption has 16 words; its start and end tokens make 18."""
MAX_PHRASES = 8
"""Three things, two relations, the background and the end token make 7, and with Qwen's start token 8."""
WORDS: tuple[str, ...] = tuple(
    sorted({*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, "and", "on", *(w for r in RELATIONS for w in r.split())})
)
THINGS: tuple[str, ...] = tuple(" ".join(words) for words in itertools.product(SIZES, COLOURS, SHAPES))
PHRASES: tuple[str, ...] = (
    *THINGS,
    *RELATIONS,
    *(f"and {relation}" for relation in RELATIONS),
    *(f"on {background}" for background in BACKGROUNDS),
)


FOREIGN_LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789,.'-"
"""Other text becomes these letters; "▁" stands for a space."""
Pieces = Sequence[tuple[str, float]]
"""Pieces of a unigram tokenizer with their log-probabilities."""


def shapes_pieces() -> Pieces:
    """A phrase is one piece, other text becomes words and letters."""
    return [
        *(("▁" + phrase.replace(" ", "▁"), -2.0) for phrase in PHRASES),
        *((f"▁{word}", -4.0) for word in WORDS if word not in PHRASES),
        *((letter, -8.0) for letter in FOREIGN_LETTERS),
    ]


def write_clip_vocabulary(directory: Path, words: Sequence[str] = WORDS) -> None:
    """Write the `vocab.json` and `merges.txt` of a CLIP tokenizer into `directory`, with one token per word.

    A merge list can only join two pieces at a time, so each word is built letter by letter from its start. Long words
    come first: an earlier merge wins, and a merge of a short word ("a" + "n" of "and") must not split a longer word
    ("triangle").
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = list(alphabet) + [f"{letter}</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in sorted(words, key=len, reverse=True):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in vocabulary:
                vocabulary.append(left)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")


def clip_tokenizer(directory: Path, max_length: int = MAX_TOKENS, words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """Write the vocabulary into `directory` and load it as a CLIP tokenizer."""
    write_clip_vocabulary(directory, words)
    return CLIPTokenizer.from_pretrained(directory, model_max_length=max_length)


def t5_tokenizer(max_length: int = MAX_PHRASES, pieces: Pieces | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer like T5's in which a phrase is one piece; `pieces` are the shapes world's unless given."""
    tokenizer = _unigram_tokenizer(["<pad>", "</s>", "<unk>"], shapes_pieces() if pieces is None else pieces)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=max_length,
    )


def qwen_tokenizer(max_length: int = MAX_PHRASES) -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen's special tokens, in which a phrase is one piece, and a chat template of two tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_unigram_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"], shapes_pieces()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
        chat_template="{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}",
    )


def _unigram_tokenizer(special: Sequence[str], pieces: Pieces) -> Tokenizer:
    """A unigram tokenizer; `<unk>` is special."""
    vocabulary = [*((token, 0.0) for token in special), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer
