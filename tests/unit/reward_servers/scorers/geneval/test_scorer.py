"""GenEval's models: mask geometry, post-processing and colours by hand; the whole with tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ModelError, RewardRejected
from common.rewards.api import MAX_ASPECT
from reward_servers.scorers.geneval.models import ObjectDetector, box_around
from reward_servers.scorers.geneval.rules import CLASSES, Detection, parse_task
from reward_servers.scorers.geneval.scorer import GenevalPartsScorer, GenevalScorer
from tests.helpers.tiny_rewards import random_images
from tests.helpers.tiny_vision import write_geneval

DOG, CUP = CLASSES.index("dog"), CLASSES.index("cup")
NOTHING = len(CLASSES)
# Long and thin: detection enlarges the shorter side up to 800 pixels, unless the longer one ends it at 1333.
HEIGHT, WIDTH = 12, 160
DEMAND = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geneval(tmp_path_factory.mktemp("models") / "geneval")


@pytest.fixture(scope="module")
def scorer(directory: Path) -> GenevalScorer:
    return GenevalScorer.load(directory, "cpu")


class StubModel(torch.nn.Module):
    """Answers with given logits; remembers the pixels it was shown."""

    def __init__(self, classes_QK: torch.Tensor, masks_Qhw: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(CLASSES)))
        self.answer = SimpleNamespace(class_queries_logits=classes_QK[None], masks_queries_logits=masks_Qhw[None])
        self.pixels = torch.empty(0)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        self.pixels = pixel_values
        return self.answer


def class_logits(*rows: dict[int, float]) -> torch.Tensor:
    """Probabilities -> logits over 81 classes; what is left goes to "no object"."""
    probabilities = torch.full((len(rows), NOTHING + 1), 1e-9)
    for row, given in enumerate(rows):
        for label, probability in given.items():
            probabilities[row, label] = probability
        probabilities[row, NOTHING] = max(1 - sum(given.values()), 1e-9)
    return probabilities.log()


def test_a_box_ends_one_pixel_beyond_its_mask() -> None:
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3] = True
    mask[4, 3:9] = True
    assert box_around(mask) == (3, 2, 9, 5)


def test_objects_are_pairs_of_query_and_class_weighed_by_their_masks() -> None:
    """An image of 800 x 800 keeps its size; masks come at a quarter of it, here of constant logits in one half."""
    certain, doubtful = 4.0, 0.5
    masks = torch.full((3, 200, 200), -8.0)
    masks[0, :, :100] = certain
    masks[1, 100:, :] = doubtful
    # Query 0 is a dog, and a cup as well; query 1 a cup whose mask is doubtful; query 2 has no mask at all.
    model = StubModel(class_logits({DOG: 0.55, CUP: 0.4}, {CUP: 0.6}, {DOG: 0.99}), masks)
    found = ObjectDetector(model, "cpu")(np.zeros((800, 800, 3), np.uint8))
    summary = sorted((item.label, round(item.confidence, 2), item.box) for item in found)
    sure, unsure = 1 / (1 + np.exp(-certain)), 1 / (1 + np.exp(-doubtful))
    assert [label for label, _, _ in summary] == ["cup", "cup", "dog"]
    expected = [0.6 * unsure, 0.4 * sure, 0.55 * sure]
    # Interpolation between the halves lowers a few columns, so that 0.01 is left.
    np.testing.assert_allclose(sorted(item.confidence for item in found), sorted(expected), atol=0.012)
    boxes = {(item.label, item.confidence > 0.38): item.box for item in found}
    assert boxes[("dog", True)][0:2] == (0.0, 0.0)
    assert abs(boxes[("dog", True)][2] - 400) <= 4
    assert boxes[("dog", True)][3] == 800.0
    assert all(item.mask_HW is not None and item.mask_HW.shape == (800, 800) for item in found)


def test_what_is_below_the_threshold_is_left_out() -> None:
    masks = torch.full((2, 8, 336), 6.0)
    model = StubModel(class_logits({DOG: 0.29}, {CUP: 0.31}), masks)
    found = ObjectDetector(model, "cpu")(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert [item.label for item in found] == ["cup"]
    nothing = StubModel(class_logits({}, {}), masks)
    assert ObjectDetector(nothing, "cpu")(np.zeros((HEIGHT, WIDTH, 3), np.uint8)) == []


@pytest.mark.parametrize(
    ("height", "width", "resized"),
    [(12, 160, (100, 1333)), (400, 600, (800, 1200)), (1024, 1024, (800, 800)), (2000, 500, (1333, 333))],
)
def test_images_are_resized_normalised_and_padded_as_mmdetection_does(
    height: int, width: int, resized: tuple[int, int]
) -> None:
    model = StubModel(class_logits({}), torch.zeros(1, 4, 4))
    ObjectDetector(model, "cpu")(np.full((height, width, 3), 255, np.uint8))
    padded = tuple(side + -side % 32 for side in resized)
    assert model.pixels.shape == (1, 3, *padded)
    white = (255 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    inside = model.pixels[0, :, : resized[0], : resized[1]]
    torch.testing.assert_close(inside, white.view(3, 1, 1).expand_as(inside))
    assert float(model.pixels[0, :, resized[0] :].abs().sum() + model.pixels[0, :, :, resized[1] :].abs().sum()) == 0


def test_masks_lie_where_the_objects_are_in_the_original_image() -> None:
    """100 x 1333 padded to 128 x 1344: a mask over half of the width without padding is one over 80 of 160."""
    masks = torch.full((1, 32, 336), -8.0)
    masks[0, :, :167] = 8.0
    model = StubModel(class_logits({DOG: 0.9}), masks)
    (found,) = ObjectDetector(model, "cpu")(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert found.box == (0.0, 0.0, 80.0, float(HEIGHT))
    assert found.mask_HW is not None
    assert found.mask_HW.shape == (HEIGHT, WIDTH)


def test_color_sees_the_object_and_nothing_else(scorer: GenevalScorer) -> None:
    namer = scorer._name_colors
    mask = np.zeros((40, 50), bool)
    mask[10:20, 5:25] = True
    mask[10, 5] = False
    image = random_images(1, 40, 50)[0]
    cut = namer._cut_out(
        torch.tensor(image).permute(2, 0, 1).float() / 255, Detection("dog", 1.0, (5, 10, 25, 20), mask)
    )
    assert cut.shape == (3, 10, 20)
    torch.testing.assert_close(cut[:, 0, 0], torch.full((3,), 153 / 255))
    torch.testing.assert_close(cut[:, 1, 1], torch.tensor(image[11, 6] / 255, dtype=torch.float32))
    elsewhere = np.where(mask[..., None], image, 0).astype(np.uint8)
    objects = [Detection("dog", 1.0, (5, 10, 25, 20), mask)] * 2
    assert namer(image, objects) == namer(elsewhere, objects)


@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (100, 1)])
def test_color_sees_the_middle_of_a_line(scorer: GenevalScorer, rows: int, columns: int) -> None:
    """Enlarged whole, a line as long as the image would take gigabytes."""
    mask = np.zeros((101, 101), bool)
    mask[:rows, :columns] = True
    box = (0.0, 0.0, float(columns), float(rows))
    cut = scorer._name_colors._cut_out(torch.rand(3, 101, 101), Detection("dog", 1.0, box, mask))
    assert cut.shape == (3, min(rows, MAX_ASPECT), min(columns, MAX_ASPECT))
    pixels = torch.arange(101.0).repeat(3, 101, 1)
    middle = scorer._name_colors._cut_out(pixels.mT if rows > 1 else pixels, Detection("dog", 1.0, box, mask))
    assert middle.flatten()[0] == (100 - MAX_ASPECT) // 2


@pytest.mark.parametrize(("height", "width"), [(1, MAX_ASPECT), (MAX_ASPECT, 1)])
def test_the_longest_pictures_are_scored(scorer: GenevalScorer, height: int, width: int) -> None:
    assert scorer.score(random_images(1, height, width), ["a"], [DEMAND]).tolist() == [0.0]


def test_colors_are_the_mean_of_unit_embeddings_of_three_templates(scorer: GenevalScorer) -> None:
    namer = scorer._name_colors
    classifier = namer._classifier("teddy bear")
    texts = ["a photo of a yellow teddy bear", "a photo of a yellow-colored teddy bear", "a photo of a yellow object"]
    ids, _ = namer._tokens(texts)
    with torch.no_grad():
        features = namer._model.get_text_features(input_ids=ids).pooler_output
    mean = (features / features.norm(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(classifier[2], mean / mean.norm())
    torch.testing.assert_close(classifier.norm(dim=1), torch.ones(10))


def test_the_tiny_model_scores_whole_requests(scorer: GenevalScorer, directory: Path) -> None:
    """Random weights are sure of nothing, so no dog is found; by parts, a count and its colour are both missed."""
    images = random_images(2, HEIGHT, WIDTH)
    scores = scorer.score(images, ["a", "b"], [DEMAND, DEMAND])
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.0, 0.0]
    parts = GenevalPartsScorer(scorer._detect, scorer._name_colors, scorer.weights_hash)
    assert parts.score(images[:1], ["a"], [DEMAND]).tolist() == [0.0]
    assert GenevalScorer.load(directory, "cpu").weights_hash == scorer.weights_hash
    assert (parts.name, parts.score_range) == ("geneval_parts", (-14.0, 1.0))


def test_both_scores_follow_the_detections(scorer: GenevalScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.ones((HEIGHT, WIDTH), bool)
    dogs = [Detection("dog", confidence, (0, 0, WIDTH, HEIGHT), mask) for confidence in (0.9, 0.8)]
    image = random_images(1, HEIGHT, WIDTH)[0]
    (color,) = scorer._name_colors(image, dogs[:1])
    parts = GenevalPartsScorer(scorer._detect, scorer._name_colors, "")
    for either in (scorer, parts):
        monkeypatch.setattr(either, "_detect", lambda _: dogs)
    other = "red" if color != "red" else "blue"
    for wanted, strict, by_parts in ((color, 1.0, 0.0), (other, 0.0, 0.0)):
        demand = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": wanted}]}
        assert scorer.score(image[None], [""], [demand]).tolist() == [strict]
        # Two dogs where one is wanted: the count scores 0, and so does the colour.
        assert parts.score(image[None], [""], [demand]).tolist() == [by_parts]


def test_a_request_without_genevals_metadata_is_rejected(scorer: GenevalScorer) -> None:
    with pytest.raises(RewardRejected, match="tag"):
        scorer.score(random_images(2, HEIGHT, WIDTH), ["a", "b"], [DEMAND, {}])
    assert parse_task(scorer.check_metadata).tag == "colors"


def test_a_detector_of_other_classes_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "clip").symlink_to(directory / "clip")
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector/model.safetensors").symlink_to(directory / "detector/model.safetensors")
    config = json.loads((directory / "detector/config.json").read_text())
    config["id2label"]["0"] = "tench"
    (tmp_path / "detector/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="80 classes from 'tench'"):
        GenevalScorer.load(tmp_path, "cpu")


def test_missing_parts_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--model DIR"):
        GenevalScorer.load(None, "cpu")
    with pytest.raises(ModelError, match=r"detector/config\.json is missing"):
        GenevalScorer.load(tmp_path, "cpu")
    (tmp_path / "detector").symlink_to(directory / "detector")
    with pytest.raises(ModelError, match=r"clip/config\.json is missing"):
        GenevalScorer.load(tmp_path, "cpu")
