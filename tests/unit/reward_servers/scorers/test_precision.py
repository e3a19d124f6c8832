"""The precision of a scorer: what it computes in, what it declares, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.types import Precision
from reward_servers.loading import ScorerSettings, load, scorer_class
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.hpsv3.scorer import HpsV3Scorer
from reward_servers.scorers.torch_scorer import TorchScorer
from tests.helpers.published_checkpoints import write_aesthetic, write_image_reward
from tests.helpers.tiny_rewards import random_images, write_hps, write_pickscore
from tests.helpers.tiny_vision import write_hpsv3
from tests.helpers.toy_scorers import BrightnessScorer

PROMPTS = ["a red cat", "two dogs"]
HALVES = (Precision.BFLOAT16, Precision.FLOAT16)
STEPS = {Precision.BFLOAT16: 2.0**-8, Precision.FLOAT16: 2.0**-11}
"""The relative rounding error of each type."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "work").mkdir()
    return {
        "hps": write_hps(folder / "hps"),
        "pickscore": write_pickscore(folder / "pickscore"),
        "aesthetic": write_aesthetic(folder / "aesthetic", folder / "work"),
        "image_reward": write_image_reward(folder / "image_reward", folder / "work"),
    }


def loaded(directories: dict[str, Path], name: str, precision: Precision | None) -> TorchScorer:
    scorer = load(scorer_class(name), ScorerSettings(name, directories[name], None, precision), "cpu")
    assert isinstance(scorer, TorchScorer)
    return scorer


NAMES = ("hps", "pickscore", "aesthetic", "image_reward")


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_those_of_float32_up_to_rounding(
    directories: dict[str, Path], name: str, precision: Precision
) -> None:
    whole, half = loaded(directories, name, None), loaded(directories, name, precision)
    assert (whole.precision, half.precision) == (Precision.FLOAT32, precision)
    images = random_images(2)
    before, after = (one.score(images, PROMPTS, [{}, {}]) for one in (whole, half))
    assert after.dtype == np.float32
    assert not np.array_equal(before, after)
    low, high = whole.score_range
    np.testing.assert_allclose(after, before, atol=16 * STEPS[precision] * min(high - low, 2 * abs(before).max()))
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    wanted, given = (one.score_with_gradient(pixels, PROMPTS, [{}, {}])[1] for one in (whole, half))
    assert given.dtype == np.float32
    cosine = (wanted * given).sum() / (np.linalg.norm(wanted) * np.linalg.norm(given))
    assert cosine > 1 - 32 * STEPS[precision]
    assert np.linalg.norm(given) == pytest.approx(np.linalg.norm(wanted), rel=32 * STEPS[precision])


@pytest.mark.parametrize("precision", HALVES)
def test_the_matrix_products_run_in_the_precision(directories: dict[str, Path], precision: Precision) -> None:
    scorer = loaded(directories, "aesthetic", precision)
    seen: dict[str, torch.dtype] = {}
    for name, module in scorer._model.named_modules():  # type: ignore[attr-defined]
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output.dtype}))
    scorer.score(random_images(1), ["a"], [{}])
    of_head = {kind for name, kind in seen.items() if name.startswith("head")}
    of_clip = {kind for name, kind in seen.items() if not name.startswith("head")}
    # The released script computes the head in float32.
    assert (of_clip, of_head) == ({getattr(torch, precision)}, {torch.float32})


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**10])
def test_gradients_in_float16_are_scaled_to_its_range(factor: float) -> None:
    class Scaled(TorchScorer):
        name = "scaled"
        score_range = (-1e9, 1e9)

        @classmethod
        def load(cls, model_dir: Path | None, device: str) -> Self:
            return cls(torch.nn.Identity(), device)

        def _scores_B(self, images_BCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            # The gradient that goes through the half tensor is `factor`, times the scale.
            return images_BCHW.flatten(1).half().float().sum(dim=1) * factor

    scorer = Scaled.load(None, "cpu")
    scorer.use(Precision.FLOAT16)
    gradients = scorer.score_with_gradient(np.ones((1, 3, 2, 2), np.float32), ["a"], [{}])[1]
    np.testing.assert_array_equal(gradients, np.full((1, 3, 2, 2), factor, np.float32))


def test_hpsv3_declares_the_type_of_its_config_and_converts_to_another(tmp_path: Path) -> None:
    directory = write_hpsv3(tmp_path / "hpsv3")
    images = random_images(1, 56, 56)
    own = load(HpsV3Scorer, ScorerSettings("hpsv3", directory, None), "cpu")
    assert own.precision is Precision.FLOAT32
    half = load(HpsV3Scorer, ScorerSettings("hpsv3", directory, None, Precision.BFLOAT16), "cpu")
    assert half.precision is Precision.BFLOAT16
    assert half.weights_hash == own.weights_hash
    scores = [one.score(images, ["a cat"], [{}])[0] for one in (own, half)]
    assert scores[0] != scores[1]
    assert scores[1] == pytest.approx(scores[0], abs=0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ocr", "--precision bfloat16: the scorer ocr cannot compute in it: choose float32"),
        ("geneval", "--precision bfloat16: the scorer geneval cannot compute in it: choose float32"),
        ("vlm_judge", "--precision bfloat16: the scorer vlm_judge cannot .*: the server of its model decides"),
    ],
)
def test_a_scorer_that_cannot_compute_in_a_precision_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(scorer_class(name), ScorerSettings(name, Path("nowhere"), None, Precision.BFLOAT16), "cpu")


class Published(BrightnessScorer):
    name = "published"
    precisions = tuple(Precision)
    gpu_precision = Precision.BFLOAT16


class Own(BrightnessScorer):
    name = "own"
    precision = Precision.FLOAT16


@pytest.mark.parametrize(
    ("kind", "device", "chosen", "precision"),
    [
        (Published, "cpu", None, Precision.FLOAT32),
        (Published, "cuda", None, Precision.BFLOAT16),
        (Published, "cuda:3", None, Precision.BFLOAT16),
        (Published, "cuda", Precision.FLOAT16, Precision.FLOAT16),
        (Published, "cpu", Precision.FLOAT16, Precision.FLOAT16),
        (BrightnessScorer, "cuda", None, Precision.FLOAT32),
        (Own, "cuda", None, Precision.FLOAT16),
    ],
)
def test_the_default_is_float32_on_the_cpu_and_that_of_the_recipe_on_gpus(
    kind: type[Scorer], device: str, chosen: Precision | None, precision: Precision
) -> None:
    assert load(kind, ScorerSettings("x", None, None, chosen), device).precision is precision


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("hps", Precision.FLOAT16),
        ("aesthetic", Precision.FLOAT16),
        ("pickscore", Precision.FLOAT32),
        ("clipscore", Precision.FLOAT32),
        ("image_reward", Precision.FLOAT32),
        ("hpsv3", None),
        ("geneval", None),
    ],
)
def test_the_table_of_the_documentation_holds(name: str, precision: Precision | None) -> None:
    assert scorer_class(name).gpu_precision is precision
