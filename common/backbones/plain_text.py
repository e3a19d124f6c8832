"""Special tokens written in a prompt are plain text: "<|endoftext|>" or "</s>" must not end it for the model."""

from __future__ import annotations

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast


def make_special_tokens_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """For a tokenizer that sees the bare prompt.

    Byte-pair encoding cannot put a special token together once it is not cut out of the text first. T5's unigram model
    can, since special tokens are pieces of its vocabulary; so they are pulled apart after normalisation.
    """
    tokenizer.split_special_tokens = True
    pull_apart = [normalizers.Replace(token, _pulled_apart(token)) for token in tokenizer.all_special_tokens]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*([backend.normalizer] if backend.normalizer else []), *pull_apart])


def spell_out_special_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """For a prompt that a chat template, which needs its special tokens, will be put around."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, _pulled_apart(token))
    return text


def _pulled_apart(token: str) -> str:
    return f"{token[0]} {token[1:]}"
