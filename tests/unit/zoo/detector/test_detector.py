from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import ModelError, RewardRejected
from reward_servers.main import server_info
from zoo.detector import DetectorScorer
from zoo.detector.reading import (
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    Detector,
    Part,
    Reading,
    connected,
    partial_credit,
)
from zoo.detector.training import rasterise
from zoo.world.scenes import SHAPES, coverage, parse_caption, render_scenes, sample_scenes

WEIGHTS = Path(__file__).parents[4] / "zoo" / "weights" / "detector"


@pytest.fixture(scope="module")
def scorer() -> DetectorScorer:
    return DetectorScorer.load(WEIGHTS, "cpu")


def _flood(classes: np.ndarray) -> np.ndarray:
    """Reference: number regions by flooding from each pixel not reached yet."""
    height, width = classes.shape
    numbers = np.full(classes.shape, -1)
    for start in np.ndindex(*classes.shape):
        todo = [start] if numbers[start] < 0 else []
        while todo:
            row, column = todo.pop()
            numbers[row, column] = start[0] * width + start[1]
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if inside and numbers[near] < 0 and classes[near] == classes[start]:
                    todo.append(near)
    return numbers


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6])
def test_connected_agrees_with_flooding(share: float) -> None:
    classes = (np.random.default_rng(0).random((3, 24, 24)) < share).astype(np.int64)
    for sample, labels in enumerate(connected(classes)):
        pairs = {*zip(labels.ravel().tolist(), _flood(classes[sample]).ravel().tolist(), strict=True)}
        assert len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})


def _part(colour: str, shape: str, x: float, y: float, area: int, sure: float = 1.0) -> Part:
    colours = {word: sure * (word == colour) for word in COLOUR_CLASSES}
    shapes = {word: sure * (word == shape) for word in SHAPE_CLASSES}
    return Part(x, y, area, colours, shapes)


RED = _part("red", "circle", 20, 20, 133)
BLUE = _part("blue", "square", 20, 50, 375)
REQUEST = parse_caption("small red circle above big blue square on white")
WHITE = {"white": 1.0, "black": 0.0}


@pytest.mark.parametrize(
    ("parts", "backgrounds", "expected"),
    [
        ((RED, BLUE), WHITE, 9 / 9),
        ((BLUE, RED), WHITE, 9 / 9),
        ((RED, BLUE), {"white": 0.0, "black": 1.0}, 8 / 9),
        # One thing missing: half of the count, its three words and the relation are lost.
        ((RED,), WHITE, 4.5 / 9),
        # Turned round: only the relation is lost.
        ((_part("red", "circle", 20, 60, 133), BLUE), WHITE, 8 / 9),
        ((_part("red", "circle", 20, 20, 375), BLUE), WHITE, 8 / 9),
        ((_part("green", "circle", 20, 20, 133), BLUE), WHITE, 8 / 9),
        ((_part("red", "circle", 20, 20, 133, sure=0.75), BLUE), WHITE, 8.5 / 9),
        ((RED, BLUE, RED), WHITE, 8.5 / 9),
        ((), WHITE, 1 / 9),
    ],
)
def test_partial_credit_by_hand(parts: tuple[Part, ...], backgrounds: dict[str, float], expected: float) -> None:
    assert partial_credit(REQUEST, Reading(parts, backgrounds)) == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_its_own_rasteriser_draws_the_worlds_outlines(shape: str) -> None:
    ours, theirs = rasterise(shape, 30.2, 33.6, 10.0), coverage(shape, 30.2, 33.6, 10.0)
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.04)
    assert np.abs((ours > 0.5).astype(int) - (theirs > 0.5)).sum() < 20


def test_right_pictures_score_high_and_foreign_ones_lower(scorer: DetectorScorer) -> None:
    scenes = sample_scenes(40, seed=91)
    images, captions = render_scenes(scenes, seed=92), [scene.caption for scene in scenes]
    right = scorer.score(images, captions, ())
    assert right.dtype == np.float32
    assert right.mean() > 0.93
    assert right.max() <= 1
    assert (right > scorer.score(images, captions[1:] + captions[:1], ())).mean() > 0.95


def test_a_score_does_not_depend_on_its_batch(scorer: DetectorScorer) -> None:
    scenes = sample_scenes(5, seed=93)
    images, captions = render_scenes(scenes, seed=94), [scene.caption for scene in scenes]
    alone = [scorer.score(images[i : i + 1], captions[i : i + 1], ())[0] for i in range(5)]
    assert scorer.score(images, captions, ()) == pytest.approx(np.array(alone), abs=1e-5)


def test_a_prompt_that_is_no_caption_is_named(scorer: DetectorScorer) -> None:
    with pytest.raises(RewardRejected, match="a cat on a mat"):
        scorer.score(np.zeros((1, 64, 64, 3), np.uint8), ["a cat on a mat"], ())


def test_missing_and_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"zoo\.build"):
        Detector.load(tmp_path)
    with pytest.raises(ModelError, match="--model"):
        DetectorScorer.load(None, "cpu")


def test_saved_runs_hold_its_class_path() -> None:
    info = server_info("any", DetectorScorer.load(WEIGHTS, "cpu"), reproducible=True)
    assert info.implementation == "zoo.detector:DetectorScorer"
