"""OCR, GenEval and HPSv3 in servers of their own: real text over real sockets, refusals that blame the request."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from common.rewards.api import SCORE_PATH, ScoreRequest, ScoreResponse
from common.wire import pack
from learner.driver.local_servers import LocalServers, LocalServerSpec
from tests.helpers.tiny_rewards import random_images
from tests.helpers.tiny_vision import write_geneval, write_hpsv3

DEADLINE = 60.0
DEMAND = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install -e '.[ocr]'")
    folder: Path = tmp_path_factory.mktemp("models")
    specs = [
        LocalServerSpec("ocr", "ocr", None),
        LocalServerSpec("geneval", "geneval", write_geneval(folder / "geneval")),
        LocalServerSpec("hpsv3", "hpsv3", write_hpsv3(folder / "hpsv3")),
    ]
    with LocalServers(specs, tmp_path_factory.mktemp("logs")) as servers:
        yield servers.urls
        servers.check()


def ask(url: str, request: ScoreRequest) -> httpx.Response:
    return httpx.post(f"{url}{SCORE_PATH}", content=request.to_bytes(), timeout=DEADLINE)


def test_text_is_read_over_http(urls: dict[str, str]) -> None:
    image = Image.new("RGB", (192, 96), "white")
    ImageDraw.Draw(image).text((16, 24), "OPEN", fill="black", font=ImageFont.load_default(40))
    images = np.stack([np.asarray(image), np.full((96, 192, 3), 255, np.uint8)])
    answer = ask(urls["ocr"], ScoreRequest(images, ['a door that says "Open"'] * 2))
    assert ScoreResponse.from_bytes(answer.content).scores_B.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", ["ocr", "geneval"])
def test_a_request_that_cannot_be_scored_is_refused_not_zero(urls: dict[str, str], name: str) -> None:
    answer = ask(urls[name], ScoreRequest(random_images(1), ["a cat"]))
    assert answer.status_code == 422
    assert answer.json()["error"] == "request"
    assert "metadata" in answer.json()["message"]


def test_a_null_in_metadata_is_an_absent_key(urls: dict[str, str]) -> None:
    filled = {"tag": "single_object", "include": [{"class": "dog", "count": 1, "color": None}], "exclude": None}
    images = random_images(1)
    body = pack({"images_BHWC": images, "prompts": ["a dog"], "metadata": [filled]})
    answer = httpx.post(f"{urls['geneval']}{SCORE_PATH}", content=body, timeout=DEADLINE)
    assert ScoreResponse.from_bytes(answer.content).scores_B.tolist() == [0.0]
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "PNG")
    fields = {"images": [base64.b64encode(file.getvalue()).decode()], "prompts": ["a dog"], "metadata": [filled]}
    assert httpx.post(f"{urls['geneval']}/score", json=fields, timeout=DEADLINE).json() == {"scores": [0.0]}


def test_the_models_with_metadata_and_long_prompts_answer(urls: dict[str, str]) -> None:
    images = random_images(2, 12, 160)
    answer = ask(urls["geneval"], ScoreRequest(images, ["a dog"] * 2, [DEMAND] * 2))
    assert ScoreResponse.from_bytes(answer.content).scores_B.tolist() == [0.0, 0.0]
    assert ask(urls["hpsv3"], ScoreRequest(images, ["x" * 9000] * 2)).status_code == 422
    scores = ScoreResponse.from_bytes(ask(urls["hpsv3"], ScoreRequest(images, ["a dog", "a cat"])).content).scores_B
    assert scores[0] != scores[1]
