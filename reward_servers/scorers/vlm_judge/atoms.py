"""The atoms of a GenEval 2 prompt: questions about an image, each with the answers that count as correct.

A line of geneval2_data.jsonl (github.com/facebookresearch/GenEval2) is the metadata of its prompt:

    {"prompt": "two red dogs", "vqa_list": [["How many dogs are in the image?", "two"], ["Are the dogs red?", "Yes"]]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from common.errors import RewardRejected
from common.rewards.api import ANY_REWARD, Metadata
from reward_servers.scorers.vlm_judge.settings import escape

KEY = "vqa_list"
MAX_ATOMS = 32
"""A prompt of the benchmark has at most about 20 questions; each costs a call of the model."""
COUNTING, INSTRUCTION = "How many", "Answer in one word."
YES, NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Atom:
    """One question as it is asked, and the spellings of its answer."""

    question: str
    answers: tuple[str, ...]


def spellings(number: str) -> tuple[str, ...]:
    """The spellings of a number word that the benchmark counts: the word and the digits, also after a space."""
    words = (number, number.capitalize(), str(NUMBERS.index(number) + 1))
    return (*words, *(f" {word}" for word in words))


ANSWERS = (YES, *map(spellings, NUMBERS))
"""The spellings of every answer that a question may have."""


def parse_atoms(metadata: Metadata) -> list[Atom]:
    """The atoms of a prompt; RewardRejected for metadata that is not GenEval 2's."""
    pairs = metadata.get(KEY)
    if not isinstance(pairs, list | tuple) or not 0 < len(pairs) <= MAX_ATOMS:
        _reject(f"the metadata has no {KEY!r} of 1 to {MAX_ATOMS} questions, as the lines of geneval2_data.jsonl have")
    return [_atom(pair) for pair in pairs]


def _atom(pair: Any) -> Atom:
    texts = pair if isinstance(pair, list | tuple) else ()
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        _reject(f"{KEY}: {str(pair)[:80]} is not a pair of a question and its answer")
    question, answer = texts
    asked = f"{escape(question)} {INSTRUCTION}"
    if question.startswith(COUNTING):
        if answer not in NUMBERS:
            _reject(f"{KEY}: the answer {answer[:80]!r} to {question[:80]!r} is not one of {', '.join(NUMBERS)}")
        return Atom(asked, spellings(answer))
    if answer not in YES:
        _reject(f"{KEY}: the answer {answer[:80]!r} to {question[:80]!r} is not Yes")
    return Atom(asked, YES)


def _reject(message: str) -> NoReturn:
    raise RewardRejected(ANY_REWARD, "request", message)
