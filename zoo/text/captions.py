"""Captions of the text world: a word of 3 to 5 capital letters, its colour, its background and its place.

    the word "CAT" in red on white at the top

Consonants and vowels alternate, and a word begins with a consonant. With the 14 letters of `LETTERS` that gives 18 000
words. A tenth of them is held out: generators and readers train on the others only.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

from zoo.world.scenes import BACKGROUNDS, COLOURS

CONSONANTS = "CDHKLNRSTX"
VOWELS = "AEOU"
LETTERS = tuple(sorted(CONSONANTS + VOWELS))
SHORTEST, LONGEST = 3, 5
PLACES = ("at the top", "in the middle", "at the bottom")
HELD_OUT_SHARE = 10
"""One word in so many is held out for evaluation."""


@dataclass(frozen=True)
class Request:
    """The demands of a caption; `place` is one of `PLACES`."""

    word: str
    colour: str
    background: str
    place: str

    @property
    def caption(self) -> str:
        return f'the word "{self.word}" in {self.colour} on {self.background} {self.place}'


_CAPTION = re.compile(
    rf'the word "([{"".join(LETTERS)}]{{{SHORTEST},{LONGEST}}})" in ({"|".join(COLOURS)}) on ({"|".join(BACKGROUNDS)})'
    rf" ({'|'.join(PLACES)})"
)


def parse_caption(caption: str) -> Request:
    """Parse a caption.

    Raises:
        ValueError: the text is not a caption of the text world.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"not a caption of the text world: {caption[:120]!r}; write it like "
            f"'the word \"CAT\" in red on white at the top', with letters of {''.join(LETTERS)}"
        )
    return Request(*match.groups())


def is_held_out(word: str) -> bool:
    """Whether a word is for evaluation only; it depends only on the word."""
    return hashlib.sha256(word.encode()).digest()[0] % HELD_OUT_SHARE == 0


def sample_word(rng: random.Random, held_out: bool = False) -> str:
    """A word of a uniformly drawn length, from the training words or the held-out ones."""
    length = rng.randint(SHORTEST, LONGEST)
    while True:
        word = "".join(rng.choice(VOWELS if index % 2 else CONSONANTS) for index in range(length))
        if is_held_out(word) == held_out:
            return word


def sample_request(rng: random.Random, held_out: bool = False) -> Request:
    """A request with uniformly drawn colour, background and place."""
    word = sample_word(rng, held_out)
    return Request(word, rng.choice(list(COLOURS)), rng.choice(list(BACKGROUNDS)), rng.choice(PLACES))


def sample_requests(count: int, seed: int, held_out: bool = False) -> list[Request]:
    """`count` requests; the result depends only on the arguments."""
    rng = random.Random(f"text {seed}")
    return [sample_request(rng, held_out) for _ in range(count)]
