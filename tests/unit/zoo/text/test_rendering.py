"""Renders of the text world show what their captions say, to us and to the real OCR engine."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.world.scenes import CANVAS, COLOURS

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install -e '.[ocr]'")

from reward_servers.scorers.ocr import OcrScorer
from zoo.text.captions import PLACES, Request, sample_requests
from zoo.text.rendering import (
    FONTS,
    JITTER_X,
    JITTER_Y,
    LEFT,
    PITCH,
    ROW_CENTRES,
    STEP_X,
    STEP_Y,
    Layout,
    letter_centres,
    letter_cover,
    render_pages,
    render_requests,
    sample_layout,
    word_cover,
)


def test_letters_stand_side_by_side_from_the_left_edge_of_the_word() -> None:
    layout = Layout("aileron", 2.0, 0.0)
    assert letter_centres("CAT", "at the top", layout) == [(8.0, 16.0), (20.0, 16.0), (32.0, 16.0)]
    assert letter_centres("CATER", "in the middle", layout)[-1] == (56.0, 32.0)
    assert letter_centres("CAT", "at the bottom", Layout("aileron", 20.5, -6.0))[0] == (26.5, 42.0)


@pytest.mark.parametrize("font", list(FONTS))
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("word", ["CAT", "XOKAD"])
def test_a_word_is_the_sum_of_its_letters_and_stays_inside(font: str, place: str, word: str) -> None:
    last, down = CANVAS - LEFT - PITCH * len(word) + JITTER_X, STEP_Y + JITTER_Y
    for layout in (Layout(font, LEFT - JITTER_X, -down), Layout(font, last, down)):
        whole = word_cover(word, place, layout)
        centres = letter_centres(word, place, layout)
        parts = [letter_cover(sign, font, x, y) for sign, (x, y) in zip(word, centres, strict=True)]
        np.testing.assert_allclose(whole, np.sum(parts, axis=0), atol=1 / 255)
        assert whole[[0, -1]].max() == 0
        rows = np.nonzero(whole.max(1) > 0.5)[0]
        assert abs(rows.mean() - (ROW_CENTRES[place] + layout.dy)) < 2
        assert whole.shape == (CANVAS, CANVAS)


@pytest.mark.parametrize(("letters", "steps"), [(3, 4), (4, 2), (5, 1)])
def test_words_are_moved_as_far_as_there_is_room(letters: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    moved = [sample_layout(letters, rng) for _ in range(300)]
    assert {layout.font for layout in moved} == set(FONTS)
    assert {round((layout.left - LEFT) / STEP_X) for layout in moved} == set(range(steps))
    assert {round(layout.dy / STEP_Y) for layout in moved} == {-1, 0, 1}
    still = [sample_layout(letters, rng, moved=False) for _ in range(300)]
    assert max(abs(layout.left - LEFT) for layout in still) <= JITTER_X
    assert max(abs(layout.dy) for layout in still) <= JITTER_Y


@pytest.mark.parametrize("font", list(FONTS))
def test_every_letter_fits_into_its_cell(font: str) -> None:
    for letter in "CDHKLNRSTXAEOU":
        cover = letter_cover(letter, font, 32.0, 32.0)
        columns = np.nonzero(cover.max(0) > 0)[0]
        assert columns.min() >= 32 - PITCH / 2
        assert columns.max() < 32 + PITCH / 2
        assert abs(columns.mean() - 31.5) < 1.5


def test_colours_and_backgrounds_are_those_asked_for() -> None:
    for colour, rgb in COLOURS.items():
        image = render_requests([Request("HEH", colour, "black", "in the middle")], seed=1)[0].astype(float)
        assert image[0, 0].max() < 0.2 * 255
        brightest = image[np.abs(image - image[0, 0]).sum(-1).argmax() // CANVAS].reshape(-1, 3)
        nearest = np.abs(brightest - np.array(rgb)).max(-1).min()
        assert nearest < 16


def test_equal_seeds_give_equal_pictures() -> None:
    requests = sample_requests(4, seed=1)
    assert np.array_equal(render_requests(requests, 2), render_requests(requests, 2))
    assert not np.array_equal(render_requests(requests, 2), render_requests(requests, 3))
    assert np.array_equal(render_pages(4, 2), render_pages(4, 2))


def test_the_real_engine_reads_renders() -> None:
    requests = sample_requests(60, seed=5, held_out=True)
    captions = [request.caption for request in requests]
    images = render_requests(requests, seed=5)
    scorer = OcrScorer.load(None, "cpu")
    assert scorer.score(images, captions, [{}] * 60).mean() >= 0.98
    assert scorer.score(images, captions[1:] + captions[:1], [{}] * 60).mean() <= 0.4
