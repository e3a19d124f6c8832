"""`remote_reward`: the shapes that other trainers call, every kind of picture they have, and what a failure does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, RewardError, RewardRejected, RewardUnavailable
from common.project_files import PROJECT_ROOT
from common.rewards.api import ByteArray, FloatArray
from reward_servers import remote_reward
from reward_servers.remote import RemoteReward, pictures_HWC
from tests.helpers.serving_app import LIMITS, serving_app
from tests.helpers.toy_scorers import BrightnessScorer

TIMEOUT = 20.0
TOKEN = "sesame, sixteen and more"


class Recorder(BrightnessScorer):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[str] = []
        self.metadata: list[Mapping[str, Any]] = []
        self.largest = 0

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Any]) -> FloatArray:
        self.prompts += prompts
        self.metadata += metadata
        self.largest = max(self.largest, len(images_BHWC))
        return super().score(images_BHWC, prompts, metadata)


def drive(scenario: Callable[[RemoteReward], None], scorer: BrightnessScorer | None = None, **options: Any) -> None:
    async def run() -> None:
        app = serving_app({"b": scorer or BrightnessScorer()}, replace(LIMITS, token=TOKEN))
        async with asyncio.timeout(TIMEOUT), app as client:
            with remote_reward(str(client.base_url), "brightness", **options) as reward:
                await asyncio.to_thread(scenario, reward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_SERVER_TOKEN", TOKEN + "\n")
        asyncio.run(run())


def picture(level: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (level, level, level))


def test_it_has_the_shape_that_trl_calls() -> None:
    """As `GRPOTrainer` calls it: keywords alone, with the columns of the data set and the state of the trainer."""
    scorer = Recorder()

    def scenario(reward: RemoteReward) -> None:
        assert reward.__name__ == "brightness"
        called = {"prompts": ["a", "b"], "completions": [picture(0), picture(255)], "completion_ids": [[1], [2]]}
        columns = {"answer": ["x", "y"], "trainer_state": object(), "images": ["not", "read"]}
        assert reward(**called, **columns) == [0.0, 1.0]
        assert reward(["a"], [picture(255)], metadata=[{"tag": "t"}]) == [1.0]
        assert reward(["a", "b"], [picture(255)] * 2, metadata=[None, {"tag": "u"}]) == [1.0, 1.0]
        assert reward(prompts=["a"], images=np.full((1, 4, 4, 3), 255, np.uint8)) == [1.0]

    drive(scenario, scorer)
    assert scorer.prompts == ["a", "b", "a", "a", "b", "a"]
    assert scorer.metadata == [{}, {}, {"tag": "t"}, {}, {"tag": "u"}, {}]


def test_it_has_the_shape_that_ddpo_and_flow_grpo_call() -> None:
    """Positional: pixels, a tuple of prompts, a tuple of metadata; the answer is a pair."""
    scorer = Recorder()

    def scenario(reward: RemoteReward) -> None:
        pixels_BCHW = np.stack([np.zeros((3, 8, 8)), np.ones((3, 8, 8))]).astype(np.float32)
        assert reward.image_reward(pixels_BCHW, ("a", "b"), ({}, {"c": 1})) == ([0.0, 1.0], {})
        assert reward.image_reward(pixels_BCHW, ("a", "b"), {}) == ([0.0, 1.0], {})
        assert reward.image_reward(pixels_BCHW, ("a", "b")) == ([0.0, 1.0], {})

    drive(scenario, scorer)
    assert scorer.metadata[:2] == [{}, {"c": 1}]


def test_a_tensor_is_scored_as_flow_grpo_rounds_it() -> None:
    torch = pytest.importorskip("torch")
    pixels = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    expected = (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pictures_HWC("b", pixels), expected)
    np.testing.assert_array_equal(pictures_HWC("b", list(pixels.requires_grad_())), expected)
    half = pictures_HWC("b", pixels.to(torch.bfloat16))
    assert np.abs(np.stack(half).astype(int) - expected).max() <= 1
    bytes_BCHW = torch.from_numpy(expected.transpose(0, 3, 1, 2).copy())
    np.testing.assert_array_equal(pictures_HWC("b", bytes_BCHW), expected)


def test_every_layout_and_kind_of_picture_is_the_same_picture() -> None:
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    floats_BCHW = pixels_BHWC.transpose(0, 3, 1, 2) / np.float64(255)
    for images in (
        pixels_BHWC,
        pixels_BHWC.transpose(0, 3, 1, 2),
        floats_BCHW,
        floats_BCHW.astype(np.float16),
        list(pixels_BHWC),
        tuple(floats_BCHW),
        [Image.fromarray(one) for one in pixels_BHWC],
        [Image.fromarray(pixels_BHWC[0]), pixels_BHWC[1]],
    ):
        np.testing.assert_array_equal(pictures_HWC("b", images), pixels_BHWC)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["a red cat"], "a picture is a str"),
        ("a red cat", "the images are a str"),
        (7, "the images are a int"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\)"),
        (np.zeros((1, 4, 4, 4), np.uint8), r"a picture has shape \(4, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.int64), "a picture has int64"),
        (np.full((1, 4, 4, 3), 255.0), r"spans \[255, 255\]"),
        (np.full((1, 4, 4, 3), -1.0), r"spans \[-1, -1\]"),
        (np.full((1, 4, 4, 3), np.nan), "spans"),
        ([Image.new("F", (4, 4))], "mode F"),
    ],
)
def test_what_is_no_picture_says_so(images: object, message: str) -> None:
    with pytest.raises(RewardRejected, match=message):
        pictures_HWC("b", images)


def test_sizes_and_many_images_are_sent_in_requests_of_their_own() -> None:
    scorer = Recorder()
    levels = [0, 51, 102, 153, 204, 255, 51]

    def scenario(reward: RemoteReward) -> None:
        pictures = [picture(level, 8 if index % 2 else 6) for index, level in enumerate(levels)]
        scores = reward(prompts=list("abcdefg"), completions=pictures)
        assert scores == pytest.approx([level / 255 for level in levels])
        assert reward(prompts=[], completions=[]) == []

    drive(scenario, scorer, images_per_request=2)
    assert (sorted(scorer.prompts), scorer.largest) == (list("abcdefg"), 2)


def test_a_failure_is_an_error_and_never_a_number() -> None:
    def scenario(reward: RemoteReward) -> None:
        with pytest.raises(RewardRejected, match="1 prompts for 2 images"):
            reward(["a"], [picture(0)] * 2)
        with pytest.raises(RewardRejected, match="1 metadata for 2 images"):
            reward.image_reward([picture(0)] * 2, ["a", "b"], [{}])
        with pytest.raises(RewardError, match="exceeds the limit"):
            reward(["a"], [picture(0, 65)])

    drive(scenario)
    with remote_reward("http://127.0.0.1:9", timeout_s=1.0, attempts=1) as gone, pytest.raises(RewardUnavailable):
        gone(["a"], [picture(0)])
    with pytest.raises(ConfigError, match="URL"):
        remote_reward("127.0.0.1:8101")


def test_several_servers_of_one_reward_are_replicas() -> None:
    async def run() -> None:
        scorers = {"b": BrightnessScorer()}
        async with asyncio.timeout(TIMEOUT), serving_app(scorers) as client:
            urls = ["http://127.0.0.1:9", str(client.base_url)]
            with remote_reward(urls) as reward:
                assert await asyncio.to_thread(reward, ["a"], [picture(255)]) == [1.0]

    asyncio.run(run())


def test_the_import_is_light() -> None:
    code = (
        "import sys; from reward_servers import remote_reward; light = set(sys.modules)\n"
        "remote_reward('http://127.0.0.1:9').close()\n"
        "print(sorted({'torch', 'ray', 'starlette', 'transformers'} & set(sys.modules)), 'httpx' in light)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[] False\n", done.stderr
