"""From a published-format checkpoint to scores over HTTP: the command converts, a real server answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from common.rewards.client import RewardClient, RewardEndpoint
from reward_servers.convert import main
from reward_servers.scorers.aesthetic import AestheticScorer
from reward_servers.scorers.clipscore import ClipScoreScorer
from reward_servers.scorers.image_reward import ImageRewardScorer
from reward_servers.scorers.torch_scorer import TorchScorer
from tests.helpers.published_checkpoints import (
    IMAGE_REWARD_SETTINGS,
    published_head,
    published_image_reward,
    write_bert_vocabulary,
)
from tests.helpers.shared_services import ServedScorer, reward_servers
from tests.helpers.tiny_rewards import CLIP_FEATURES, random_images, write_pickscore

DEADLINE = 120.0
SCORERS = (ClipScoreScorer, AestheticScorer, ImageRewardScorer)
PROMPTS = ["a red cat", "naïve 京 [SEP]", "a red cat"]


def convert(folder: Path, scorer: str, options: str) -> None:
    with redirect_stdout(io.StringIO()) as told:
        assert main([scorer, *options.split(), "--out", str(folder / scorer)]) == 0
    assert f"--scorer {scorer} --model {folder / scorer}" in told.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories by scorer; all but CLIP, which needs no conversion, were converted."""
    folder = tmp_path_factory.mktemp("rewards")
    write_pickscore(folder / "clipscore")
    torch.save(published_head(CLIP_FEATURES), folder / "head.pth")
    torch.save(published_image_reward(), folder / "ImageReward.pt")
    (folder / "tiny.json").write_text(json.dumps(IMAGE_REWARD_SETTINGS))
    bert = write_bert_vocabulary(folder / "bert")
    convert(folder, "aesthetic", f"{folder / 'head.pth'} --clip {folder / 'clipscore'}")
    convert(
        folder,
        "image_reward",
        f"{folder / 'ImageReward.pt'} --tokenizer {bert} --architecture {folder / 'tiny.json'}",
    )
    return {kind.name: folder / kind.name for kind in SCORERS}


@pytest.fixture(scope="module")
def client(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardClient]:
    scorers = {name: ServedScorer(name, directory) for name, directory in models.items()}
    with reward_servers(scorers, tmp_path_factory.mktemp("server")) as urls:
        endpoints = [RewardEndpoint(name, url) for name, url in urls.items()]
        with RewardClient(endpoints, timeout_s=DEADLINE, attempts=2) as reward_client:
            yield reward_client


@pytest.mark.parametrize("kind", SCORERS, ids=lambda kind: kind.name)
def test_scores_and_gradients_over_http_are_the_scorers_own(
    kind: type[TorchScorer], client: RewardClient, models: dict[str, Path]
) -> None:
    scorer = kind.load(models[kind.name], "cpu")
    info = client.info(kind.name)
    assert (info.weights_hash, info.version) == (scorer.weights_hash, scorer.version)
    assert (info.low, info.high) == pytest.approx(scorer.score_range)
    images = random_images(3, 40, 51)
    scores = client.score(images, PROMPTS)[kind.name]
    np.testing.assert_allclose(scores, scorer.score(images, PROMPTS, [{}] * 3), atol=1e-5)

    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    again, gradients = client.gradient(kind.name, pixels, PROMPTS)
    np.testing.assert_allclose(again, scores, atol=1e-5)
    for index, prompt in enumerate(PROMPTS):
        picture = torch.tensor(pixels[index : index + 1], requires_grad=True)
        scorer._scores_B(picture, [prompt]).sum().backward()
        assert picture.grad is not None
        expected = picture.grad[0].numpy()
        np.testing.assert_allclose(gradients[index], expected, atol=1e-4 * float(np.abs(expected).max()))
