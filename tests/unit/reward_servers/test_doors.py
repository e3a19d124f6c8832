"""The doors of the scoring routes: reading ends with the patience of its request."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from common.errors import RewardUnavailable
from reward_servers.doors import PlainDoor
from reward_servers.limits import Patience
from tests.helpers.serving_app import LIMITS


def plain_body() -> bytearray:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return bytearray(json.dumps({"images": [image] * 2, "prompts": ["a", "b"]}).encode())


def test_a_body_that_nobody_waits_for_is_not_read() -> None:
    patience = Patience(60.0)
    patience.end()
    with pytest.raises(RewardUnavailable, match="not read within its deadline"):
        PlainDoor().open(plain_body(), LIMITS, "hps", patience)


def test_decoding_ends_when_nobody_waits_any_more() -> None:
    patience = Patience(60.0)
    opened = PlainDoor().open(plain_body(), LIMITS, "hps", patience)
    patience.end()
    with pytest.raises(RewardUnavailable, match="not read within its deadline"):
        opened.decode()


def test_a_decoded_request_keeps_its_pixels_once() -> None:
    body = plain_body()
    files: list[Image.Image] = []
    open_picture = Image.open

    def opened(*arguments: object, **options: object) -> Image.Image:
        files.append(open_picture(*arguments, **options))  # type: ignore[arg-type]
        return files[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", opened)
        request = PlainDoor().open(body, LIMITS, "hps", Patience(60.0)).decode()
    assert request.images_BHWC.shape == (2, 8, 8, 3)
    assert (request.images_BHWC[1, 3, 4] == (10, 20, 30)).all()
    for file in files:
        with pytest.raises(ValueError, match="Operation on closed image"):
            file.getpixel((0, 0))
