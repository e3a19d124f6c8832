from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from common.errors import RewardInvalid, RewardRejected, WireError
from common.rewards.api import (
    MAX_PROMPT_BYTES,
    GradientRequest,
    GradientResponse,
    ScoreRequest,
    ScoreResponse,
    ServerInfo,
)
from common.wire import pack

IMAGES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
PIXELS = np.linspace(0, 1, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
SCORES = np.array([0.5, -1.0], dtype=np.float32)


def test_requests_survive_the_trip() -> None:
    score = ScoreRequest.from_bytes(ScoreRequest(IMAGES, ["a", "b"], [{"count": 2}, {}]).to_bytes())
    np.testing.assert_array_equal(score.images_BHWC, IMAGES)
    assert (score.prompts, score.metadata) == (["a", "b"], [{"count": 2}, {}])
    gradient = GradientRequest.from_bytes(GradientRequest(PIXELS, ("a", "b")).to_bytes())
    np.testing.assert_array_equal(gradient.images_BCHW, PIXELS)
    assert (list(gradient.prompts), list(gradient.metadata)) == (["a", "b"], [])


def test_responses_survive_the_trip() -> None:
    score = ScoreResponse.from_bytes(ScoreResponse("hps", "abc", SCORES).to_bytes())
    gradient = GradientResponse.from_bytes(GradientResponse("hps", "abc", SCORES, PIXELS).to_bytes())
    assert (score.scorer, score.weights_hash) == ("hps", "abc")
    np.testing.assert_array_equal(score.scores_B, SCORES)
    np.testing.assert_array_equal(gradient.gradients_BCHW, PIXELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_BHWC": IMAGES.astype(np.float32)}, "uint8 array of 4"),
        ({"images_BHWC": IMAGES[0]}, "of 4 dimensions"),
        ({"images_BHWC": IMAGES[..., :2]}, "channels"),
        ({"images_BHWC": IMAGES[:0], "prompts": []}, "at least one image"),
        ({"images_BHWC": [1, 2]}, "a list"),
        ({"prompts": ["a"]}, "1 prompts for 2 images"),
        ({"prompts": "ab"}, "list of strings"),
        ({"prompts": ["a", 3]}, "list of strings"),
        ({"metadata": [{}]}, "1 metadata for 2"),
        ({"metadata": ["x", "y"]}, "list of maps"),
    ],
)
def test_a_wrong_score_request_is_rejected_and_says_why(change: dict[str, Any], message: str) -> None:
    fields = {"images_BHWC": IMAGES, "prompts": ["a", "b"], "metadata": []} | change
    with pytest.raises(RewardRejected, match=message):
        ScoreRequest(**fields)
    with pytest.raises(RewardRejected, match=message):
        ScoreRequest.from_bytes(pack(fields))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 1, 33, 3), "1 x 33"), ((1, 67, 2, 3), "67 x 2"), ((1, 1, 16_000, 3), "1 x 16000")],
)
def test_a_sliver_is_rejected_by_its_header(shape: tuple[int, ...], message: str) -> None:
    fields = {"images_BHWC": np.zeros(shape, np.uint8), "prompts": ["a"], "metadata": []}
    with pytest.raises(
        RewardRejected, match=f"{message} pixels is a sliver: its sides differ by more than 32"
    ) as caught:
        ScoreRequest.from_bytes(pack(fields))
    assert caught.value.cause == "request"
    pixels_BCHW = np.zeros((1, 3, *shape[1:3]), np.float32)
    with pytest.raises(RewardRejected, match="is a sliver"):
        GradientRequest.from_bytes(pack({"images_BCHW": pixels_BCHW, "prompts": ["a"], "metadata": []}))


def test_a_long_picture_is_none_yet() -> None:
    assert ScoreRequest.from_bytes(ScoreRequest(np.zeros((1, 1, 32, 3), np.uint8), ["a"]).to_bytes()).prompts == ["a"]


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("x" * (MAX_PROMPT_BYTES + 1), {}),
        ("é" * (MAX_PROMPT_BYTES // 2 + 1), {}),
        ("a", {"text": "x" * (MAX_PROMPT_BYTES + 1)}),
        ("a", {"deep": [{"er": [1, "x" * (MAX_PROMPT_BYTES + 1)]}]}),
        ("a", {"x" * (MAX_PROMPT_BYTES + 1): 1}),
    ],
)
def test_a_text_that_no_encoder_reads_is_rejected_wherever_it_stands(prompt: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(RewardRejected, match=f"at most {MAX_PROMPT_BYTES} are read: shorten it") as caught:
        ScoreRequest(IMAGES, ["b", prompt], [{}, metadata])
    assert len(str(caught.value)) < 200


def test_the_longest_texts_are_taken() -> None:
    longest = "é" * (MAX_PROMPT_BYTES // 2)
    request = ScoreRequest(IMAGES, ["a", longest], [{"text": longest}, {}])
    assert ScoreRequest.from_bytes(request.to_bytes()).prompts == ["a", longest]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_pixels_of_a_gradient_request_lie_in_the_unit_interval(value: float) -> None:
    pixels = PIXELS.copy()
    pixels[1, 2, 3, 4] = value
    with pytest.raises(RewardRejected, match=r"in \[0, 1\]"):
        GradientRequest(pixels, ["a", "b"])


def test_fields_are_exactly_those_of_the_contract() -> None:
    with pytest.raises(RewardRejected, match="has the fields"):
        ScoreRequest.from_bytes(pack({"images_BHWC": IMAGES, "prompts": ["a", "b"]}))
    with pytest.raises(RewardRejected, match="extra"):
        ScoreRequest.from_bytes(pack(vars(ScoreRequest(IMAGES, ["a", "b"])) | {"extra": 1}))
    with pytest.raises(WireError):
        ScoreRequest.from_bytes(b"junk")


@pytest.mark.parametrize(
    ("scores", "cause"),
    [
        (np.array([0.1, math.nan], np.float32), "nan"),
        (np.array([0.1, -math.inf], np.float32), "nan"),
        (np.array([0.1, 0.2]), "dtype"),
        (np.ones((2, 1), np.float32), "shape"),
        ([0.1, 0.2], "dtype"),
    ],
)
def test_a_wrong_answer_is_invalid_with_its_cause(scores: Any, cause: str) -> None:
    with pytest.raises(RewardInvalid) as caught:
        ScoreResponse("hps", "abc", scores)
    assert (caught.value.cause, caught.value.reward) == (cause, "hps")


def test_gradients_are_finite_and_as_many_as_scores() -> None:
    with pytest.raises(RewardInvalid, match="not finite for images"):
        GradientResponse("hps", "abc", SCORES, np.where(PIXELS == 1, np.nan, PIXELS))
    with pytest.raises(RewardInvalid, match="2 scores but 1 gradients"):
        GradientResponse("hps", "abc", SCORES, PIXELS[:1])


def test_info_keeps_infinite_bounds() -> None:
    info = ServerInfo("judge", "1", "abc", False, 0.0, math.inf, "p1")
    assert ServerInfo.from_json(info.to_json()) == info
    assert b"Infinity" not in info.to_json()


def test_a_server_from_before_precisions_computed_in_float32() -> None:
    values = json.loads(ServerInfo("judge", "1", "abc", False, 0.0, 1.0, "p1").to_json())
    del values["precision"]
    assert ServerInfo.from_json(json.dumps(values).encode()).precision == "float32"
    values["precision"] = "bfloat16"
    assert ServerInfo.from_json(json.dumps(values).encode()).precision == "bfloat16"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"low": "x", "high": 1}', b"\xff"])
def test_info_that_is_none_is_invalid(body: bytes) -> None:
    with pytest.raises(RewardInvalid, match="did not describe"):
        ServerInfo.from_json(body)
