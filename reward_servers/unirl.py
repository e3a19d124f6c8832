"""`POST /score` as UniRL's reward client sends it (Tencent-Hunyuan/UniRL, unirl/reward/remote.py, protocol version 1).

    {"protocol_version": "1", "requests": [
        {"history": [{"text": prompt, "image_b64": base64}], "required_rewards": [NAME], "metadata": {} or null,
         "request_id": ..., "sample_id": ..., ...}]}
    ->  {"protocol_version": "1", "results": [{NAME: {"score": number}}], "errors": [{}], "identities": [{...}]}

One URL is one scorer, so `required_rewards` is the name of the scorer and nothing else. The identities come back as
they were sent, with the hash of the weights as `scorer_version`: set UniRL's `expected_scorer_version` to it to pin
them. A request with two pictures (a source and its edit) or a video is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.rewards.api import Metadata
from reward_servers.fair_queue import Response
from reward_servers.limits import RequestLimits
from reward_servers.picture_files import Check
from reward_servers.picture_request import PictureRequest, list_of, open_request, reject, require_fields

VERSION = "1"
REQUESTS = "requests"
FIELDS = {REQUESTS, "protocol_version"}
ITEM_FIELDS = {"history", "required_rewards"}
TURN_FIELDS = {"text", "image_b64"}
IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")
SCORER_VERSION = "scorer_version"
"""A client may send the version that it expects; the answer has ours."""
SUB_METRIC = "score"
"""UniRL's rewards are maps of named numbers; ours have one."""
MAX_IDENTITY_CHARACTERS = 1024
"""Each text of an identity, which the answer repeats, is at most so long."""


def read(fields: Mapping[str, Any], limits: RequestLimits, scorer: str, check: Check) -> PictureRequest:
    """Read the parsed JSON of a request to `scorer`; RewardRejected for an invalid one."""
    require_fields("the body", fields, {REQUESTS}, FIELDS)
    version = fields.get("protocol_version", VERSION)
    if version != VERSION:
        reject(f"protocol_version is {str(version)[:8]!r}, this server speaks {VERSION!r}")
    items = list_of(REQUESTS, fields[REQUESTS])
    for item in items:
        _check_item(item, scorer)
    turns = [_turn(item["history"]) for item in items]
    identities = [{key: _identity(key, item.get(key)) for key in IDENTITY} for item in items]
    images, prompts = [turn["image_b64"] for turn in turns], [turn["text"] for turn in turns]
    return open_request(
        images, prompts, _metadata(items), lambda response: _answer(response, identities), limits, check
    )


def health(scorer: str) -> dict[str, Any]:
    """The body of `GET /health`, from which the client learns the names of the rewards."""
    return {"status": "ok", "rewards": {scorer: [SUB_METRIC]}}


def _check_item(item: object, scorer: str) -> None:
    if not isinstance(item, dict):
        reject(f"a request is a {type(item).__name__}, not an object")
    require_fields("a request", item, ITEM_FIELDS, {*IDENTITY, SCORER_VERSION, "metadata"})
    wanted = item["required_rewards"]
    if wanted != [scorer]:
        reject(f"required_rewards is {str(wanted)[:80]}: at this URL the one reward is {scorer!r}")


def _turn(history: object) -> Mapping[str, Any]:
    turns = list_of("history", history)
    if len(turns) != 1:
        reject(f"history has {len(turns)} entries: a reward here judges one picture")
    turn = turns[0]
    if not isinstance(turn, dict):
        reject(f"an entry of history is a {type(turn).__name__}, not an object")
    require_fields("an entry of history", turn, TURN_FIELDS, set())
    return turn


def _metadata(items: Sequence[Mapping[str, Any]]) -> Sequence[Metadata]:
    """One map per image; none at all where nobody has one."""
    given = [item.get("metadata") for item in items]
    return [{} if one is None else one for one in given] if any(one is not None for one in given) else ()


def _identity(key: str, value: object) -> str | int | None:
    if value is not None and not isinstance(value, str | int):
        reject(f"{key} is a {type(value).__name__}, not a text, an integer or null")
    if isinstance(value, str) and len(value) > MAX_IDENTITY_CHARACTERS:
        reject(f"{key} has {len(value)} characters, at most {MAX_IDENTITY_CHARACTERS} are repeated")
    return value


def _answer(response: Response, identities: Sequence[dict[str, str | int | None]]) -> bytes:
    scores = response.scores_B.tolist()
    body = {
        "protocol_version": VERSION,
        "results": [{response.scorer: {SUB_METRIC: score}} for score in scores],
        "errors": [{} for _ in scores],
        "identities": [identity | {SCORER_VERSION: response.weights_hash} for identity in identities],
    }
    return json.dumps(body).encode()
