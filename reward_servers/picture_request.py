"""A scoring request of picture files, as the routes for other programs' clients read it: JSON and pickles.

`reward_servers.picture_files` says how a file is read and what is refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from common.errors import RewardRejected
from common.rewards.api import ANY_REWARD, CHANNELS, QUOTED_CHARACTERS, Metadata, ScoreRequest, check_texts
from reward_servers.fair_queue import Response
from reward_servers.limits import RequestLimits
from reward_servers.picture_files import SENT_FORMATS, Check, open_picture, pixels_HWC

MAX_IMAGES = 1024


@dataclass(frozen=True)
class PictureRequest:
    """A request of which only the image headers have been read.

    Attributes:
        files: B opened pictures.
        prompts, metadata: as in ScoreRequest.
        encode: makes the body of the answer.
    """

    files: Sequence[Image.Image]
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    encode: Callable[[Response], bytes]

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
            reject(f"images of {len(sizes)} sizes in one request: one size each request, and at least one image")
        return ScoreRequest(np.stack(images), self.prompts, self.metadata)


def open_request(
    images: Sequence[object],
    prompts: Sequence[object],
    metadata: Sequence[Metadata],
    encode: Callable[[Response], bytes],
    limits: RequestLimits,
    check: Check,
) -> PictureRequest:
    """Read the headers of the images, each bytes of a file or their base64; RewardRejected for an invalid request."""
    if len(images) > MAX_IMAGES:
        reject(f"{len(images)} images in one request, at most {MAX_IMAGES} are read")
    texts = [_text(prompt) for prompt in prompts]
    # Checked before any image is opened, because most images are megabytes.
    check_texts(texts, metadata)
    files = [open_picture(_content(image), SENT_FORMATS, limits.max_pixels, check) for image in images]
    request = PictureRequest(files, texts, metadata, encode)
    if request.decoded_bytes > limits.max_body_bytes:
        message = f"the images take {request.decoded_bytes} bytes once decoded, the limit is {limits.max_body_bytes}"
        raise RewardRejected(ANY_REWARD, "too_large", f"{message}: send fewer at once or raise --max-body-mb")
    return request


def list_of(field: str, value: object) -> list[Any]:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, list) else reject(f"{field} is a {type(value).__name__}, not a list")


def metadata_of(value: object, count: int) -> Sequence[Metadata]:
    """One map per image. One map for all is repeated; an absent or empty one means none."""
    if isinstance(value, Mapping):
        return [value] * count if value else ()
    return list_of("metadata", value) if value is not None else ()


def require_fields(what: str, fields: Mapping[str, Any], required: set[str], optional: set[str]) -> None:
    """RewardRejected for a map that lacks a field or has one that is not known."""
    if not required <= set(fields) <= required | optional:
        given = [name[:QUOTED_CHARACTERS] for name in sorted(fields)[:8]]
        wanted = sorted(required | optional)
        reject(f"{what} has the fields {given}, wanted are {wanted}, and {sorted(required)} at least")


def reject(message: str) -> NoReturn:
    raise RewardRejected(ANY_REWARD, "request", message)


def _content(image: object) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        reject(f"an image is a {type(image).__name__}, not a base64 string")
    if image.startswith("data:"):
        reject("an image is a data: URL, not base64 alone: send what follows its comma")
    try:
        # MIME and the base64 command end a line after 76 characters.
        return base64.b64decode(image.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RewardRejected(ANY_REWARD, "request", f"an image is not base64: {error}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        reject(f"a prompt is a {type(value).__name__}, not a string")
    return value
