"""Text rendered here, read by the real models of rapidocr."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from common.errors import ModelError, RewardRejected
from common.rewards.api import MAX_ASPECT, ByteArray

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install -e '.[ocr]'")

from reward_servers.scorers import ocr
from reward_servers.scorers.ocr import (
    MAX_LINES_WIDTH,
    MAX_TEXT_CHARACTERS,
    OcrScorer,
    demanded_text,
    edit_distance,
    first_lines,
    similarity,
)

PROMPT = 'a poster with "Hello World" on it'


def render(words: str, size: int = 40, side: int = 256, ink: str = "black", paper: str = "white") -> ByteArray:
    image = Image.new("RGB", (side, side), paper)
    ImageDraw.Draw(image).multiline_text((8, side // 3), words, fill=ink, font=ImageFont.load_default(size))
    return np.asarray(image)


@pytest.fixture(scope="module")
def scorer() -> OcrScorer:
    return OcrScorer.load(None, "cpu")


@pytest.mark.parametrize(
    ("words", "size", "side"), [("Hello World", 12, 128), ("HELLO\nworld", 40, 256), ("Hello World", 60, 512)]
)
def test_rendered_text_of_any_size_is_read(scorer: OcrScorer, words: str, size: int, side: int) -> None:
    assert scorer.score(render(words, size, side)[None], [PROMPT], [{}]).tolist() == [1.0]


def test_small_coloured_text_is_read_from_metadata(scorer: OcrScorer) -> None:
    image = render("cafe", 10, 48, ink="yellow", paper="navy")
    assert scorer.score(image[None], ["no quotes"], [{"text": "Cafe"}]).tolist() == [1.0]


def test_the_further_from_the_demanded_text_the_lower(scorer: OcrScorer) -> None:
    images = np.stack([render(words) for words in ("Hello World", "Hallo Wald", "Jumps", "")])
    scores = scorer.score(images, [PROMPT] * 4, [{}] * 4)
    assert scores.dtype == np.float32
    # "hallowald" is 3 edits from the 10 letters of "helloworld".
    np.testing.assert_allclose(scores[:2], [1.0, 0.7], atol=1e-6)
    assert scores[1] > scores[2]
    # No text at all: a real score, not a failure.
    assert scores[3] == 0.0


def test_a_tall_picture_is_read(scorer: OcrScorer) -> None:
    tall = np.full((128 * 6, 128, 3), 255, np.uint8)
    tall[:128] = render("Hello", 30, 128)
    assert scorer.read(tall).strip() == "Hello"


@pytest.mark.parametrize(
    ("height", "width", "seen"),
    [
        # PaddleOCR's rule: the longer side is at most 960 and both are multiples of 32; nothing is enlarged.
        (64, 64, (64, 64)),
        (512, 512, (512, 512)),
        (1024, 1024, (960, 960)),
        (2048, 512, (960, 256)),
        # Before that, rapidocr enlarges a shorter side below 30 pixels to 32.
        (1, 1, (32, 32)),
        (MAX_ASPECT, 1, (960, 32)),
    ],
)
def test_the_detector_sees_no_more_than_960_pixels(
    scorer: OcrScorer, height: int, width: int, seen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = scorer._reader._load_det_model()
    shapes = []
    run = detector.session
    monkeypatch.setattr(detector, "session", lambda image: shapes.append(image.shape[-2:]) or run(image))
    assert scorer.read(np.zeros((height, width, 3), np.uint8)) == ""
    assert shapes == [seen]


def test_only_the_first_lines_of_a_page_are_read() -> None:
    def line(width: int, height: int = 48) -> ByteArray:
        return np.zeros((height, width, 3), np.uint8)

    assert MAX_LINES_WIDTH == 49_152
    short, page = line(10), line(1000)
    # Each counts as 320 pixels: 153 of them are 48 960, 154 would be 49 280.
    assert len(first_lines([short] * 500)) == 153
    # 1000 x 24 pixels become 2000 x 48.
    assert len(first_lines([line(1000, 24)] * 100)) == 24
    assert len(first_lines([page] * 49)) == 49
    # A first line that is too long is cut: 8 192 x 8 pixels would become 49 152 x 48.
    assert [one.shape for one in first_lines([line(60_000), short])] == [(48, 49_152, 3)]
    assert [one.shape for one in first_lines([line(9_000, 8), short])] == [(8, 8_192, 3)]
    assert [one.shape for one in first_lines([line(8_192, 8), short])] == [(8, 8_192, 3)]
    assert first_lines([]) == []


def test_a_page_of_text_costs_what_its_first_lines_cost(scorer: OcrScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "MAX_LINES_WIDTH", 700)
    # Two lines of 320 pixels fit, a third does not.
    assert scorer.read(render("one\ntwo\nthree", 30, 256)) == "onetwo"


def test_of_a_first_line_that_is_too_long_the_beginning_is_read(
    scorer: OcrScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = render("one two three four five six", 30, 512)
    assert scorer.read(image).replace(" ", "") == "onetwothreefourfivesix"
    monkeypatch.setattr(ocr, "MAX_LINES_WIDTH", 400)
    begun = scorer.read(image).replace(" ", "")
    assert begun.startswith("onetwo")
    assert "six" not in begun


def test_noise_and_slivers_have_no_text(scorer: OcrScorer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert [scorer.read(image) for image in (noise, np.zeros((1, 1, 3), np.uint8))] == ["", ""]
    for shape in ((1, MAX_ASPECT, 3), (MAX_ASPECT, 1, 3), (16, 16 * MAX_ASPECT, 3)):
        assert scorer.read(np.zeros(shape, np.uint8)) == ""


@pytest.mark.parametrize(
    ("read", "demanded", "score"),
    [
        ("Open", "OPEN", 1.0),
        ("o p\ne n", "open", 1.0),
        ("now open daily", "Open", 1.0),  # the published rule: the text may stand among others
        ("opem", "open", 0.75),
        ("open", "opened", 4 / 6),
        ("", "open", 0.0),
        ("xyz", "open", 0.0),
        ("a much longer text", "cd", 0.0),  # never below 0
        ("開店", "開業", 0.5),
    ],
)
def test_similarity_by_hand(read: str, demanded: str, score: float) -> None:
    assert similarity(read, demanded) == pytest.approx(score)


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance_by_hand(first: str, second: str, edits: int) -> None:
    assert edit_distance(first, second) == edits
    assert edit_distance(second, first) == edits


def test_edit_distance_is_the_textbook_recursion() -> None:
    @functools.cache
    def edits(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        changed = edits(first[1:], second[1:]) + (first[0] != second[0])
        return min(edits(first[1:], second) + 1, edits(first, second[1:]) + 1, changed)

    draw = random.Random(0)
    for _ in range(50):
        first, second = ("".join(draw.choices("ab開", k=draw.randint(0, 9))) for _ in range(2))
        assert edit_distance(first, second) == edits(first, second)


def test_a_text_that_no_picture_holds_is_rejected() -> None:
    longest = "x" * MAX_TEXT_CHARACTERS
    assert demanded_text("", {"text": longest}) == longest
    for prompt, metadata in ((f'"{longest}x"', {}), ("", {"text": longest + "x"})):
        with pytest.raises(RewardRejected, match="has 1025 characters, at most 1024 are read: demand less"):
            demanded_text(prompt, metadata)


@pytest.mark.parametrize(
    ("prompt", "metadata", "text"),
    [
        ('a "first" and a "second" sign', {}, "first"),
        ("a sign “Grüße” there", {}, "Grüße"),
        ("“unclosed, “closed”", {}, "closed"),
        ('a "sign"', {"text": "another"}, "another"),
        ("a sign", {"text": "STOP"}, "STOP"),
    ],
)
def test_what_is_demanded(prompt: str, metadata: Mapping[str, Any], text: str) -> None:
    assert demanded_text(prompt, metadata) == text


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a cat", {}),
        ('an unclosed "quote', {}),
        ('empty ""', {}),
        ('blank "  "', {}),
        ('a "sign"', {"text": ""}),
        ('a "sign"', {"text": 7}),
        ("it's a 'sign'", {}),
    ],
)
def test_a_request_that_demands_no_text_is_rejected(
    scorer: OcrScorer, prompt: str, metadata: Mapping[str, Any]
) -> None:
    with pytest.raises(RewardRejected, match="demands no text") as caught:
        scorer.score(np.stack([render("x"), render("y")]), [PROMPT, prompt], [{}, metadata])
    assert (caught.value.reward, caught.value.cause) == ("ocr", "request")


def test_the_identity_names_the_models_and_the_settings(scorer: OcrScorer) -> None:
    assert len(scorer.weights_hash) == 32
    assert (scorer.score_range, scorer.differentiable) == ((0.0, 1.0), False)
    # A run that is resumed with another setting stops: see common.rewards.identity.
    assert scorer.preprocess_version == "rapidocr-3.10.0-max960-lines49152-4"


def test_a_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="brings its own models"):
        OcrScorer.load(tmp_path, "cpu")
