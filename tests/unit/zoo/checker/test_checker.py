from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ModelError, RewardRejected
from reward_servers.main import server_info
from zoo.checker import GoldScorer
from zoo.checker.parsing import STRIDE, CheckerNet, GoldChecker, Thresholds, to_pixels
from zoo.checker.training import checker_loss, targets_of
from zoo.world.corruptions import Picture, broken_picture, clean_picture, gaussian_blur, soften
from zoo.world.scenes import CANVAS, Thing, render_scenes, sample_scenes

WEIGHTS = Path(__file__).parents[4] / "zoo" / "weights" / "checker"
COUNT = 60


@pytest.fixture(scope="module")
def checker() -> GoldChecker:
    return GoldChecker.load(WEIGHTS)


def _bytes(images: list[np.ndarray]) -> np.ndarray:
    return np.round(np.stack(images) * 255).astype(np.uint8)


def test_it_reads_held_out_renders(checker: GoldChecker) -> None:
    scenes = sample_scenes(COUNT, seed=71)
    parses = checker.parse(render_scenes(scenes, seed=72))
    exact = 0
    for parse, scene in zip(parses, scenes, strict=True):
        found, drawn = sorted(parse.things, key=lambda t: (t.x, t.y)), sorted(scene.things, key=lambda t: (t.x, t.y))
        same = [thing.words for thing in found] == [thing.words for thing in drawn]
        near = same and all(np.hypot(a.x - b.x, a.y - b.y) < 2 for a, b in zip(found, drawn, strict=True))
        exact += near and parse.background == scene.background
    assert exact >= 0.95 * COUNT


def test_gold_accepts_what_is_right_and_slightly_soft(checker: GoldChecker) -> None:
    scenes, rng = sample_scenes(COUNT, seed=73), np.random.default_rng(74)
    images = _bytes([soften(clean_picture(scene, rng).image_HWC, rng) for scene in scenes])
    assert checker.verdict(images, [scene.caption for scene in scenes]).mean() >= 0.93


def test_gold_refuses_another_caption(checker: GoldChecker) -> None:
    scenes = sample_scenes(COUNT, seed=75)
    captions = [scene.caption for scene in scenes]
    assert checker.verdict(render_scenes(scenes, seed=76), captions[1:] + captions[:1]).mean() <= 0.05


@pytest.mark.parametrize("kind", ["blurred", "erased", "faded", "smeared", "cut", "stained"])
def test_gold_refuses_damage(checker: GoldChecker, kind: str) -> None:
    scenes, rng = sample_scenes(COUNT, seed=77), np.random.default_rng(78)
    images = _bytes([broken_picture(scene, kind, rng).image_HWC for scene in scenes])
    assert checker.verdict(images, [scene.caption for scene in scenes]).mean() <= 0.15


def test_more_blur_never_helps(checker: GoldChecker) -> None:
    scenes = sample_scenes(30, seed=79)
    renders = render_scenes(scenes, seed=80).astype(np.float32) / 255
    captions = [scene.caption for scene in scenes]
    rates = [
        checker.verdict(_bytes([gaussian_blur(image, sigma) for image in renders]), captions).mean()
        for sigma in (0.3, 1.3, 2.5)
    ]
    assert rates[0] >= rates[1] >= rates[2]
    assert rates[0] > 0.9
    assert rates[2] < 0.05


def test_uint8_and_float_images_are_read_alike(checker: GoldChecker) -> None:
    images = render_scenes(sample_scenes(4, seed=81), seed=82)
    words = [[thing.words for thing in parse.things] for parse in checker.parse(images)]
    floats = checker.parse(images.astype(np.float32) / 255)
    assert [[thing.words for thing in parse.things] for parse in floats] == words


def test_targets_of_a_hand_made_picture() -> None:
    intact, hurt = Thing("small", "red", "circle", 10.0, 22.0), Thing("big", "blue", "square", 50.0, 50.0)
    damage = np.zeros((CANVAS, CANVAS), bool)
    damage[50, 50] = True
    image = np.zeros((CANVAS, CANVAS, 3), np.float32)
    targets = targets_of([Picture(image, (intact, hurt), (False, True), "black", damage)])
    assert targets["peak"][0].nonzero().tolist() == [[5, 2], [12, 12]]
    assert targets["damage"][0].nonzero().tolist() == [[12, 12]]
    # Cell (5, 2) has its middle at (10, 22): exactly the thing's centre.
    assert targets["offset"][0, :, 5, 2].tolist() == [0, 0]
    assert targets["offset"][0, :, 5, 1].tolist() == [1, 0]
    assert targets["words"][0, :, 5, 2].tolist() == [0, 0, 0]
    assert targets["known"][0, 5, 2]
    assert not targets["known"][0, 12, 12]
    assert targets["placed"][0, 12, 12]
    assert targets["heat"][0].max() == pytest.approx(1.0)


def test_the_loss_has_a_gradient_for_every_weight() -> None:
    torch.manual_seed(0)
    net, rng = CheckerNet(8, 1), np.random.default_rng(0)
    pictures = [broken_picture(scene, "erased", rng) for scene in sample_scenes(3, seed=4)]
    pictures += [clean_picture(scene, rng) for scene in sample_scenes(3, seed=5)]
    pixels = to_pixels(np.stack([picture.image_HWC for picture in pictures]))
    checker_loss(net(pixels), targets_of(pictures)).backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in net.parameters())


def test_the_scorer_follows_the_contract(checker: GoldChecker) -> None:
    scorer = GoldScorer.load(WEIGHTS, "cpu")
    scenes = sample_scenes(8, seed=83)
    images, captions = render_scenes(scenes, seed=84), [scene.caption for scene in scenes]
    scores = scorer.score(images, captions, ())
    assert scores.dtype == np.float32
    assert scores.tolist() == checker.verdict(images, captions).astype(float).tolist()
    assert scorer.weights_hash == GoldScorer.load(WEIGHTS, "cpu").weights_hash != ""
    assert scorer.score(images[:1], [scorer.check_prompt], ()).shape == (1,)
    with pytest.raises(RewardRejected, match="a cat on a mat"):
        scorer.score(images[:1], ["a cat on a mat"], ())
    with pytest.raises(RewardRejected, match=r"\[1, 32, 32, 3\]"):
        scorer.score(images[:1, :32, :32], captions[:1], ())
    with pytest.raises(ModelError, match="--model"):
        GoldScorer.load(None, "cpu")


def test_images_of_another_size_are_refused(checker: GoldChecker) -> None:
    with pytest.raises(ValueError, match=r"\[1, 32, 32, 3\]"):
        checker.parse(np.zeros((1, 32, 32, 3), np.uint8))
    assert CANVAS % STRIDE == 0


def test_saved_is_what_is_loaded(tmp_path: Path, checker: GoldChecker) -> None:
    GoldChecker(checker.net, Thresholds(0.3, 0.7)).save(tmp_path)
    loaded = GoldChecker.load(tmp_path)
    assert loaded.thresholds == Thresholds(0.3, 0.7)
    images = render_scenes(sample_scenes(2, seed=85), seed=86)
    assert [parse.damage for parse in loaded.parse(images)] == [parse.damage for parse in checker.parse(images)]


def test_missing_and_truncated_weights(tmp_path: Path, checker: GoldChecker) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        GoldChecker.load(tmp_path)
    checker.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("damage", "damages"))
    with pytest.raises(ModelError, match="damages"):
        GoldChecker.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = tmp_path / "checker.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated"):
        GoldChecker.load(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        GoldChecker.load(tmp_path)


def test_saved_runs_hold_its_class_path() -> None:
    info = server_info("any", GoldScorer.load(WEIGHTS, "cpu"), reproducible=True)
    assert info.implementation == "zoo.checker:GoldScorer"
