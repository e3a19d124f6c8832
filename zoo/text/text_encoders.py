"""Text encoders of the text world, of the same form as the shapes world's: trained to read captions, then frozen.

T5 must know at every letter which one it is, its index, and the word's colour, background and place. CLIP reads from
left to right, so its letters know only themselves and their index; its pooled outputs must know the whole caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.sd3.text_encoders import (
    CLIP_WIDTH,
    T5_WIDTH,
    TextEncoders,
    clip_features,
    new_text_encoders,
    token_ids,
    train_readers,
)
from zoo.text.captions import LETTERS, LONGEST, PLACES, Request, parse_caption, sample_request
from zoo.text.tokenizers import MAX_PIECES, MAX_TOKENS, text_clip_tokenizer, text_t5_tokenizer
from zoo.world.scenes import BACKGROUNDS, COLOURS

STEPS = 250
LETTER_FACTS = {"letter": len(LETTERS), "index": LONGEST}
"""Each fact of a letter maps to its number of answers."""
WORD_FACTS = {"colour": len(COLOURS), "background": len(BACKGROUNDS), "place": len(PLACES)}
"""Each fact of a caption maps to its number of answers."""


def train_text_encoders(seed: int, steps: int = STEPS) -> tuple[TextEncoders, float]:
    """Train all three together; return them frozen, and the fraction of held-out facts read correctly."""
    torch.manual_seed(seed)
    encoders = new_text_encoders(text_clip_tokenizer(), text_t5_tokenizer())
    readers = nn.ModuleList(
        [
            FactReader(2 * CLIP_WIDTH, LETTER_FACTS),
            FactReader(T5_WIDTH, {**LETTER_FACTS, **WORD_FACTS}),
            FactReader(2 * CLIP_WIDTH, {**WORD_FACTS, **{f"slot {k}": len(LETTERS) + 1 for k in range(LONGEST)}}),
        ]
    )
    modules = nn.ModuleList([encoders.clip_1, encoders.clip_2, encoders.t5, readers])
    accuracy = train_readers(
        modules,
        lambda captions: _read(encoders, readers, captions),
        lambda rng: sample_request(rng, held_out=not modules.training).caption,
        seed,
        steps,
    )
    return encoders, accuracy


class FactReader(nn.Module):
    """Predicts facts from features; `answers` maps each fact to its number of answers."""

    def __init__(self, width: int, answers: dict[str, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({fact: nn.Linear(width, count) for fact, count in answers.items()})

    def forward(self, features_Nd: Tensor, facts: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Summed cross-entropy of all facts, and the fraction of right answers."""
        logits = {fact: head(features_Nd) for fact, head in self.heads.items()}
        loss = sum((functional.cross_entropy(logits[fact], facts[fact]) for fact in logits), torch.zeros(()))
        right = [(logits[fact].argmax(-1) == facts[fact]).float().mean().item() for fact in logits]
        return loss, sum(right) / len(right)


def _read(encoders: TextEncoders, readers: nn.ModuleList, captions: list[str]) -> tuple[Tensor, float]:
    requests = [parse_caption(caption) for caption in captions]
    tokens, pooled = clip_features(encoders, token_ids(encoders.clip_tokenizer, captions, MAX_TOKENS))
    t5_tokens = encoders.t5(token_ids(encoders.t5_tokenizer, captions, MAX_PIECES))[0]
    letters, rows, index = letter_facts(requests)
    # CLIP's first letter follows the start token and the opening phrase, T5's only the opening phrase.
    clip_loss, clip_right = readers[0](tokens[rows, index + 2], letters)
    t5_loss, t5_right = readers[1](t5_tokens[rows, index + 1], letters)
    pooled_loss, pooled_right = readers[2](pooled, caption_facts(requests))
    return clip_loss + t5_loss + pooled_loss, (clip_right + t5_right + pooled_right) / 3


def letter_facts(requests: Sequence[Request]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The true answers for every letter of all words, each letter's caption, and its index in the word."""
    words = caption_facts(requests)
    rows = torch.tensor([row for row, request in enumerate(requests) for _ in request.word])
    index = torch.tensor([index for request in requests for index in range(len(request.word))])
    facts = {fact: words[fact][rows] for fact in WORD_FACTS}
    facts["letter"] = torch.tensor([LETTERS.index(letter) for request in requests for letter in request.word])
    return {**facts, "index": index}, rows, index


def caption_facts(requests: Sequence[Request]) -> dict[str, Tensor]:
    """The true answers for every caption; the slots after a short word's end have the answer after all letters."""
    facts = {
        "colour": [list(COLOURS).index(request.colour) for request in requests],
        "background": [list(BACKGROUNDS).index(request.background) for request in requests],
        "place": [PLACES.index(request.place) for request in requests],
    }
    for slot in range(LONGEST):
        facts[f"slot {slot}"] = [
            LETTERS.index(request.word[slot]) if slot < len(request.word) else len(LETTERS) for request in requests
        ]
    return {fact: torch.tensor(answers) for fact, answers in facts.items()}
