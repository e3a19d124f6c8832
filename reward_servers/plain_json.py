"""Plain JSON route `POST /score`, for trainers that do not use our client. It has the same limits as the main route.

Two request formats, both in use by published trainers, with images as base64 of a PNG or JPEG file:

    {"images": [base64, ...], "prompts": [text, ...], "metadata": {} or [{}, ...]}  ->  {"scores": [number, ...]}
    {"image_base64": base64, "prompt": text}                                        ->  {"score": number}

The first has the fields of Flow-GRPO's reward servers (yifan123/flow_grpo, and verl-project/verl-omni
docs/start/http_scorer.md). They send these fields as a pickle; this route takes JSON, because unpickling a request runs
its sender's code. The second is the format of one-image reward servers (yy01zz02/INPAINTING, reward_server/).

`reward_servers.picture_files` says how a file is read and what is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from common import strict_json
from common.errors import RewardRejected
from common.rewards.api import (
    ANY_REWARD,
    CHANNELS,
    QUOTED_CHARACTERS,
    Metadata,
    ScoreRequest,
    check_texts,
)
from reward_servers.limits import RequestLimits
from reward_servers.picture_files import SENT_FORMATS, Check, open_picture, pixels_HWC, unhurried

MANY_FIELDS = {"images", "prompts", "metadata"}
ONE_FIELDS = {"image_base64", "prompt"}
MAX_JSON_ITEMS = 100_000
"""A body may have at most this many commas and brackets; base64 has none.

Without this limit a hostile body becomes objects of 25 times its size.
"""
MAX_IMAGES = 1024


@dataclass(frozen=True)
class PlainRequest:
    """A request of which only the image headers have been read."""

    files: Sequence[Image.Image]
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    single: bool

    @property
    def decoded_bytes(self) -> int:
        return sum(image.width * image.height for image in self.files) * CHANNELS

    def decode(self) -> ScoreRequest:
        """Decode the pixels, once; RewardRejected for a broken file or images of different sizes."""
        images = []
        for image in self.files:
            images.append(pixels_HWC(image))
            image.close()  # it would keep its pixels a second time until the answer
        # Only now: a photo may have been turned.
        sizes = {image_HWC.shape for image_HWC in images}
        if len(sizes) != 1:
            _reject(f"images of {len(sizes)} sizes in one request: one size each request, and at least one image")
        return ScoreRequest(np.stack(images), self.prompts, self.metadata)

    def answer(self, scores: Sequence[float]) -> bytes:
        return json.dumps({"score": scores[0]} if self.single else {"scores": list(scores)}).encode()


def parse(body: bytearray, limits: RequestLimits, check: Check = unhurried) -> PlainRequest:
    """Read a body up to the headers of its images; RewardRejected for an invalid request.

    `check` is called between the steps of this and of decoding, and may raise to end them.
    """
    items = sum(body.count(mark) for mark in b",[{")
    if items > MAX_JSON_ITEMS:
        _reject(f"the body has {items} commas and brackets, at most {MAX_JSON_ITEMS} are read")
    check()
    try:
        fields = strict_json.parse(body)
    except ValueError as error:
        raise RewardRejected(ANY_REWARD, "wire", f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        _reject(f"the body is a {type(fields).__name__}, not an object")
    check()
    request = _one(fields, limits, check) if set(fields) == ONE_FIELDS else _many(fields, limits, check)
    if request.decoded_bytes > limits.max_body_bytes:
        message = f"the images take {request.decoded_bytes} bytes once decoded, the limit is {limits.max_body_bytes}"
        raise RewardRejected(ANY_REWARD, "too_large", f"{message}: send fewer at once or raise --max-body-mb")
    return request


def _one(fields: Mapping[str, Any], limits: RequestLimits, check: Check) -> PlainRequest:
    return PlainRequest([_open(fields["image_base64"], limits, check)], [_text(fields["prompt"])], (), single=True)


def _many(fields: Mapping[str, Any], limits: RequestLimits, check: Check) -> PlainRequest:
    if not {"images", "prompts"} <= set(fields) <= MANY_FIELDS:
        given = [name[:QUOTED_CHARACTERS] for name in sorted(fields)[:8]]
        _reject(f"the body has the fields {given}, wanted are {sorted(MANY_FIELDS)} or {sorted(ONE_FIELDS)}")
    images, prompts = _list("images", fields["images"]), _list("prompts", fields["prompts"])
    if len(images) > MAX_IMAGES:
        _reject(f"{len(images)} images in one request, at most {MAX_IMAGES} are read")
    texts = [_text(prompt) for prompt in prompts]
    metadata = _metadata(fields.get("metadata"), len(images))
    # Checked before any image is opened, because most images are megabytes.
    check_texts(texts, metadata)
    return PlainRequest([_open(image, limits, check) for image in images], texts, metadata, single=False)


def _open(encoded: object, limits: RequestLimits, check: Check) -> Image.Image:
    if not isinstance(encoded, str):
        _reject(f"an image is a {type(encoded).__name__}, not a base64 string")
    if encoded.startswith("data:"):
        _reject("an image is a data: URL, not base64 alone: send what follows its comma")
    try:
        # MIME and the base64 command end a line after 76 characters.
        content = base64.b64decode(encoded.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RewardRejected(ANY_REWARD, "request", f"an image is not base64: {error}") from error
    return open_picture(content, SENT_FORMATS, limits.max_pixels, check)


def _list(field: str, value: object) -> list[Any]:
    return value if isinstance(value, list) else _reject(f"{field} is a {type(value).__name__}, not a list")


def _text(value: object) -> str:
    if not isinstance(value, str):
        _reject(f"a prompt is a {type(value).__name__}, not a string")
    return value


def _metadata(value: object, count: int) -> Sequence[Metadata]:
    """One map per image. One map for all is repeated; an absent or empty one means none."""
    if isinstance(value, Mapping):
        return [value] * count if value else ()
    return _list("metadata", value) if value is not None else ()


def _reject(message: str) -> NoReturn:
    raise RewardRejected(ANY_REWARD, "request", message)
