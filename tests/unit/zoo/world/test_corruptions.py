from __future__ import annotations

import numpy as np
import pytest

from zoo.world.corruptions import (
    FOOTPRINT,
    KINDS,
    MILD_NOISE,
    broken_picture,
    clean_picture,
    compose,
    gaussian_blur,
    layers_of,
    plain_background,
    soften,
)
from zoo.world.scenes import CANVAS, sample_scenes


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_damages_the_picture_and_says_where(kind: str) -> None:
    for index, scene in enumerate(sample_scenes(8, seed=3)):
        picture = broken_picture(scene, kind, np.random.default_rng(index))
        assert picture.damage_HW.any()
        assert picture.image_HWC.shape == (CANVAS, CANVAS, 3)
        assert picture.image_HWC.min() >= 0
        assert picture.image_HWC.max() <= 1
        assert any(picture.broken) == (kind != "stained")


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_a_function_of_its_seed(kind: str) -> None:
    scene = sample_scenes(1, seed=5)[0]
    first, second = (broken_picture(scene, kind, np.random.default_rng(1)).image_HWC for _ in range(2))
    assert np.array_equal(first, second)


def test_a_clean_picture_is_the_composition_of_its_layers() -> None:
    scene = sample_scenes(1, seed=6)[0]
    picture = clean_picture(scene, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    layers = layers_of(scene, rng)
    assert np.array_equal(picture.image_HWC, compose(layers, plain_background(scene.background, rng)))
    assert not picture.damage_HW.any()
    assert not any(picture.broken)


def test_a_cut_thing_keeps_pixels_inside_and_leaves_some_outside() -> None:
    for index, scene in enumerate(sample_scenes(10, seed=7)):
        picture = broken_picture(scene, "cut", np.random.default_rng(index))
        border = np.concatenate([picture.damage_HW[[0, -1]].ravel(), picture.damage_HW[:, [0, -1]].ravel()])
        assert border.any()


def test_blur_has_the_variance_it_is_asked_for() -> None:
    impulse = np.zeros((CANVAS, CANVAS), np.float32)
    impulse[32, 32] = 1
    blurred = gaussian_blur(impulse, 2.0)
    place = np.arange(CANVAS) - 32
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    assert (blurred.sum(0) * place**2).sum() == pytest.approx(4.0, rel=0.01)


def test_blur_leaves_a_plain_image_alone() -> None:
    plain = np.full((CANVAS, CANVAS, 3), 0.4, np.float32)
    assert np.allclose(gaussian_blur(plain, 3.0), plain, atol=1e-6)


def test_softening_is_slight() -> None:
    scene = sample_scenes(1, seed=8)[0]
    image = clean_picture(scene, np.random.default_rng(0)).image_HWC
    change = soften(image, np.random.default_rng(1)) - image
    flat = np.max([layer.cover_HW for layer in layers_of(scene, np.random.default_rng(0))], axis=0) < FOOTPRINT / 100
    # Away from outlines only noise and brightness (3 % at most) remain.
    assert np.abs(change[flat]).mean() < 0.03 + MILD_NOISE
    assert np.abs(change).max() < 0.5
