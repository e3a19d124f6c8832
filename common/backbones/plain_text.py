"""Makes special tokens in a prompt plain text: "<|endoftext|>" or "</s>" must not end the prompt for the model."""

from __future__ import annotations

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast


def make_special_tokens_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Change a tokenizer that gets the bare prompt.

    Byte-pair encoding cannot assemble a special token unless it is first cut out of the text. T5's unigram model can,
    because special tokens are pieces of its vocabulary; so a space is put into them after normalisation.
    """
    tokenizer.split_special_tokens = True
    pull_apart = [normalizers.Replace(token, _pulled_apart(token)) for token in tokenizer.all_special_tokens]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*([backend.normalizer] if backend.normalizer else []), *pull_apart])


def spell_out_special_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Change a prompt that will be put into a chat template, which needs its own special tokens."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, _pulled_apart(token))
    return text


def _pulled_apart(token: str) -> str:
    return f"{token[0]} {token[1:]}"
