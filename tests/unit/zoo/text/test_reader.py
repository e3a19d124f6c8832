"""The shipped gold reader accepts exactly the right word, and refuses wrong, blended and broken letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import ModelError, RewardRejected
from common.rewards.api import ByteArray

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install -e '.[ocr]'")

from zoo.text import GoldReader
from zoo.text.captions import LETTERS, LONGEST, Request, sample_requests
from zoo.text.reader import NOTHING, UNREADABLE, Reader, Reading
from zoo.text.reader_training import KINDS, draw_example, drawn, measure
from zoo.text.rendering import render_requests

WEIGHTS = Path(__file__).parents[4] / "zoo" / "weights" / "text_reader"
COUNT = 80
CAT = Request("CAT", "red", "white", "at the top")


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load(WEIGHTS)


def test_only_exactly_what_was_asked_for_obeys() -> None:
    right = Reading("CAT", "red", "white", "at the top", damage=0.1)
    assert right.obeys(CAT, threshold=0.5)
    assert not right.obeys(CAT, threshold=0.1)
    for word, colour, background, place in (
        ("CA", "red", "white", "at the top"),
        ("CA?", "red", "white", "at the top"),
        ("CATS", "red", "white", "at the top"),
        ("CAT", "blue", "white", "at the top"),
        ("CAT", "red", "neither", "at the top"),
        ("CAT", "red", "white", "at the bottom"),
    ):
        assert not Reading(word, colour, background, place, damage=0.0).obeys(CAT, threshold=0.5)


def test_it_reads_held_out_words(reader: Reader) -> None:
    requests = sample_requests(COUNT, seed=71, held_out=True)
    readings = reader.read(render_requests(requests, seed=72))
    assert np.mean([reading.word == request.word for reading, request in zip(readings, requests, strict=True)]) >= 0.95
    captions = [request.caption for request in requests]
    assert reader.verdict(render_requests(requests, seed=72), captions).mean() >= 0.9


def test_it_refuses_another_caption_and_one_wrong_letter(reader: Reader) -> None:
    figures = measure(reader, seed=900, count=COUNT)
    assert figures["wrong_caption_obeys"] == 0
    assert figures["one_wrong_letter_obeys"] <= 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_it_refuses_damage(reader: Reader, kind: str) -> None:
    requests = sample_requests(COUNT, seed=73, held_out=True)
    assert reader.verdict(drawn(requests, kind, seed=74), [request.caption for request in requests]).mean() <= 0.3


def test_an_example_knows_which_letters_are_broken() -> None:
    rng = np.random.default_rng(0)
    intact, blended, blurred = (draw_example(CAT, kind, rng) for kind in (None, "letter_blend", "blurred image"))
    letters = tuple(LETTERS.index(letter) for letter in "CAT")
    assert intact.slots == (*letters, NOTHING, NOTHING)
    assert not intact.damaged
    assert 1 <= blended.slots.count(UNREADABLE) <= 2
    assert all(slot in {letter, UNREADABLE} for slot, letter in zip(blended.slots, letters, strict=False))
    assert blurred.slots == (UNREADABLE,) * 3 + (NOTHING,) * (LONGEST - 3)
    assert blended.damaged
    assert blurred.damaged


def test_the_scorer_gives_ones_and_noughts_and_refuses_foreign_captions() -> None:
    scorer = GoldReader.load(WEIGHTS, "cpu")
    images: ByteArray = render_requests([CAT, CAT], seed=1)
    scores = scorer.score(images, [CAT.caption, CAT.caption.replace("CAT", "COT")], [{}, {}])
    assert (scores.tolist(), scores.dtype) == ([1.0, 0.0], np.float32)
    with pytest.raises(RewardRejected, match="not a caption of the text world"):
        scorer.score(images, ["a red circle"] * 2, [{}, {}])
    with pytest.raises(RewardRejected, match=r"images must be \[B, 64, 64, 3\]"):
        scorer.score(images[:, :32], [CAT.caption] * 2, [{}, {}])


def test_a_directory_without_a_reader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no reader at"):
        Reader.load(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 64}')
    with pytest.raises(ModelError, match="holds no usable reader"):
        Reader.load(tmp_path)
    with pytest.raises(ModelError, match="pass --model DIR"):
        GoldReader.load(None, "cpu")
