"""Scenes of the shapes world: captions describe them, renders show them, and `obeys` compares both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from zoo.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    CELL,
    CELL_JITTER,
    Request,
    Scene,
    Thing,
    coverage,
    obeys,
    parse_caption,
    render_scenes,
    sample_grid_scenes,
    sample_scenes,
)

LONGEST = "small red circle left of big blue square and right of small green triangle on white"


@pytest.mark.parametrize("sample", [sample_scenes, sample_grid_scenes])
def test_every_scene_obeys_its_own_caption(sample: Callable[[int, int], list[Scene]]) -> None:
    for scene in sample(300, 1):
        assert obeys(parse_caption(scene.caption), scene.things, scene.background)


def test_a_caption_is_read_by_hand() -> None:
    assert parse_caption(LONGEST) == Request(
        (("small", "red", "circle"), ("big", "blue", "square"), ("small", "green", "triangle")),
        ("left of", "right of"),
        "white",
    )


@pytest.mark.parametrize(
    "text", ["", "red circle on white", "small red circle", "small pink circle on white", LONGEST + "!"]
)
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


def test_obeying_needs_every_word_the_count_the_relation_and_the_background() -> None:
    request = parse_caption("small red circle above big blue square on white")
    top, bottom = Thing("small", "red", "circle", 20, 10), Thing("big", "blue", "square", 20, 40)
    assert obeys(request, [bottom, top], "white")
    assert not obeys(request, [top, bottom], "black")
    assert not obeys(request, [top], "white")
    assert not obeys(request, [top, bottom, bottom], "white")
    assert not obeys(request, [Thing("small", "red", "square", 20, 10), bottom], "white")
    assert not obeys(request, [Thing("small", "red", "circle", 20, 60), bottom], "white")


def test_grid_things_stand_in_cells_of_their_own() -> None:
    for scene in sample_grid_scenes(200, 2):
        cells = [(int(thing.x // CELL), int(thing.y // CELL)) for thing in scene.things]
        assert len(set(cells)) == len(cells)
        for thing in scene.things:
            assert abs(thing.x % CELL - CELL / 2) <= CELL_JITTER
            assert abs(thing.y % CELL - CELL / 2) <= CELL_JITTER


def test_a_render_shows_colour_and_background_where_they_belong() -> None:
    scene = Scene((Thing("big", "red", "square", 32, 32),), (), "black")
    image = render_scenes([scene], 0)[0]
    assert image.shape == (CANVAS, CANVAS, 3)
    red, green, blue = image[32, 32].astype(int)
    assert red > 190
    assert max(green, blue) < 70
    low, high = BACKGROUNDS["black"]
    assert low * 255 - 1 <= image[2, 2].max() <= high * 255 + 1
    assert np.array_equal(render_scenes([scene], 0), render_scenes([scene], 0))


def test_a_circle_covers_its_area() -> None:
    assert coverage("circle", 32, 32, 10).sum() == pytest.approx(np.pi * 100, rel=0.02)
