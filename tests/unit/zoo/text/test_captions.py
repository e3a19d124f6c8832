"""Captions and prompt files of the text world: what they demand, which words they may contain, who sees which."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.text.captions import (
    CONSONANTS,
    LETTERS,
    LONGEST,
    SHORTEST,
    VOWELS,
    Request,
    is_held_out,
    parse_caption,
    sample_requests,
)
from zoo.text.prompts import EVALUATION_PROMPTS, TRAIN_PROMPTS, write_text_prompts

SHIPPED = Path(__file__).parents[4] / "zoo/prompts"


def test_a_caption_is_parsed_into_what_it_demands() -> None:
    request = parse_caption('the word "CATS" in red on white in the middle')
    assert request == Request("CATS", "red", "white", "in the middle")
    assert all(parse_caption(one.caption) == one for one in sample_requests(200, seed=1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "small red circle on white",
        'the word "CAT" in red on white',
        'the word "CAT" in red on white at the left',
        'the word "CAT" in pink on white at the top',
        'the word "CAT" in red on grey at the top',
        'the word "cat" in red on white at the top',
        'the word "CA" in red on white at the top',
        'the word "CATERS" in red on white at the top',
        'the word "DOG" in red on white at the top',
        "the word CAT in red on white at the top",
        'the word "CAT" in red on white at the top, please',
    ],
)
def test_foreign_captions_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the text world"):
        parse_caption(text)


def test_words_have_3_to_5_letters_and_alternate() -> None:
    words = {request.word for request in sample_requests(2000, seed=2)}
    assert {len(word) for word in words} == set(range(SHORTEST, LONGEST + 1))
    assert all(set(word[::2]) <= set(CONSONANTS) and set(word[1::2]) <= set(VOWELS) for word in words)
    assert set("".join(words)) == set(LETTERS)


def test_a_tenth_of_the_words_is_held_out() -> None:
    words = [a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS]
    assert 0.05 < sum(map(is_held_out, words)) / len(words) < 0.15
    assert not any(is_held_out(request.word) for request in sample_requests(500, seed=3))
    assert all(is_held_out(request.word) for request in sample_requests(500, seed=3, held_out=True))


def test_the_shipped_prompts_are_full_and_their_words_are_disjoint(tmp_path: Path) -> None:
    write_text_prompts(tmp_path)
    words = {}
    for name, count in (("train", TRAIN_PROMPTS), ("evaluation", EVALUATION_PROMPTS)):
        lines = (SHIPPED / f"text_{name}.txt").read_text().splitlines()
        assert lines == (tmp_path / f"text_{name}.txt").read_text().splitlines()
        assert len(lines) == count
        words[name] = {parse_caption(line).word for line in lines}
    assert words["train"].isdisjoint(words["evaluation"])
