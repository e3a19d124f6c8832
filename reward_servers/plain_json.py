"""Plain JSON route `POST /score`, for trainers that do not use our client. It has the same limits as the main route.

Three request formats, all in use by published trainers, with images as base64 of a PNG or JPEG file:

    {"images": [base64, ...], "prompts": [text, ...], "metadata": {} or [{}, ...]}  ->  {"scores": [number, ...]}
    {"image_base64": base64, "prompt": text}                                        ->  {"score": number}
    {"requests": [...], "protocol_version": "1"}                                    ->  see `reward_servers.unirl`

The first has the fields of the reward servers that Flow-GRPO and verl-omni ask. They send them as a pickle, which
`reward_servers.flow_grpo` reads. The second is the format of one-image reward servers (yy01zz02/INPAINTING,
reward_server/).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common import strict_json
from common.errors import RewardRejected
from common.rewards.api import ANY_REWARD, QUOTED_CHARACTERS
from reward_servers import unirl
from reward_servers.fair_queue import Response
from reward_servers.limits import RequestLimits
from reward_servers.picture_files import Check, unhurried
from reward_servers.picture_request import PictureRequest, list_of, metadata_of, open_request, reject

MANY_FIELDS = {"images", "prompts", "metadata"}
ONE_FIELDS = {"image_base64", "prompt"}
MAX_JSON_ITEMS = 100_000
"""A body may have at most this many commas and brackets; base64 has none.

Without this limit a hostile body becomes objects of 25 times its size.
"""


def parse(body: bytearray, limits: RequestLimits, scorer: str, check: Check = unhurried) -> PictureRequest:
    """Read a body up to the headers of its images; RewardRejected for an invalid request.

    `check` is called between the steps of this and of decoding, and may raise to end them.
    """
    items = sum(body.count(mark) for mark in b",[{")
    if items > MAX_JSON_ITEMS:
        reject(f"the body has {items} commas and brackets, at most {MAX_JSON_ITEMS} are read")
    check()
    try:
        fields = strict_json.parse(body)
    except ValueError as error:
        raise RewardRejected(ANY_REWARD, "wire", f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        reject(f"the body is a {type(fields).__name__}, not an object")
    check()
    if unirl.REQUESTS in fields:
        return unirl.read(fields, limits, scorer, check)
    return _one(fields, limits, check) if set(fields) == ONE_FIELDS else _many(fields, limits, check)


def _one(fields: Mapping[str, Any], limits: RequestLimits, check: Check) -> PictureRequest:
    return open_request([fields["image_base64"]], [fields["prompt"]], (), _score, limits, check)


def _many(fields: Mapping[str, Any], limits: RequestLimits, check: Check) -> PictureRequest:
    if not {"images", "prompts"} <= set(fields) <= MANY_FIELDS:
        given = [name[:QUOTED_CHARACTERS] for name in sorted(fields)[:8]]
        wanted = f"{sorted(MANY_FIELDS)}, {sorted(ONE_FIELDS)} or {sorted(unirl.FIELDS)}"
        reject(f"the body has the fields {given}, wanted are {wanted}")
    images, prompts = list_of("images", fields["images"]), list_of("prompts", fields["prompts"])
    metadata = metadata_of(fields.get("metadata"), len(images))
    return open_request(images, prompts, metadata, _scores, limits, check)


def _score(response: Response) -> bytes:
    return json.dumps({"score": response.scores_B.tolist()[0]}).encode()


def _scores(response: Response) -> bytes:
    return json.dumps({"scores": response.scores_B.tolist()}).encode()
