"""`POST /` as the reward clients of Flow-GRPO and verl-omni send it, with `--accept-flow-grpo`: plain pickles.

    {"images": [bytes of a JPEG or PNG, ...], "prompts": [text, ...], "metadata": {} or [{}, ...]}
    {"images": [...], "meta_datas": [{"tag": ..., "include": ..., "prompt": ...}, ...], "only_strict": bool}
    {"images": [...], "prompts": [...], "metadata": {"meta_datas": [...], "only_strict": bool}}

The first is what verl-omni sends (docs/start/http_scorer.md), the second what Flow-GRPO sends to its GenEval server
(flow_grpo/rewards.py), the third is that of deepgen_rl. Every answer is a pickle with `scores`, and `outputs` with the
same numbers, which Flow-GRPO's other clients read. To `meta_datas` it has what yifan123/reward-server answers as well:
`rewards` and `strict_rewards`, each 1 where the score is 1 and else 0, and both by tag. A scorer gives one number, so
`rewards` is GenEval's own verdict if `geneval` is served, and `strict_rewards` Flow-GRPO's if `geneval_parts` is.

`reward_servers.plain_pickle` reads the bodies; nothing in them is imported, called or built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.rewards.api import Metadata
from reward_servers import plain_pickle
from reward_servers.fair_queue import Response
from reward_servers.limits import RequestLimits
from reward_servers.picture_files import Check
from reward_servers.picture_request import (
    PictureRequest,
    list_of,
    metadata_of,
    open_request,
    reject,
    require_fields,
)

GENEVAL, STRICT = "meta_datas", "only_strict"
FIELDS = {"prompts", "metadata", GENEVAL, STRICT}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OTHER_TAG = -10.0
"""Stands in the list of a tag for an image of another tag; Flow-GRPO leaves these out of its means."""
FULL_SCORE = 1.0


def read(body: bytearray, limits: RequestLimits, check: Check) -> PictureRequest:
    """Read a body up to the headers of its images; WireError for a pickle that is not read, else RewardRejected."""
    fields = plain_pickle.loads(body, limits.max_body_bytes, check)
    if not isinstance(fields, dict):
        reject(f"the body is a {type(fields).__name__}, not a dict")
    require_fields("the body", fields, {"images"}, FIELDS)
    images = list_of("images", fields["images"])
    given = list_of("prompts", fields["prompts"]) if "prompts" in fields else []
    tasks = _geneval(fields)
    check()
    if tasks is None:
        if "prompts" not in fields:
            reject('the body has no prompts: send data["prompts"], a list with the prompt of each image')
        metadata = metadata_of(_as_json(fields.get("metadata")), len(images))
        return open_request(images, given, metadata, _scores, limits, check)
    if len(tasks) != len(images):
        reject(f"{len(tasks)} {GENEVAL} for {len(images)} images: one each")
    prompts = given or [_prompt(task) for task in tasks]
    return open_request(images, prompts, tasks, lambda response: _verdicts(response, tasks), limits, check)


def _geneval(fields: Mapping[str, Any]) -> list[Metadata] | None:
    """GenEval's metadata of each image; None for a request of the plain format."""
    metadata = fields.get("metadata")
    given = metadata if isinstance(metadata, Mapping) and GENEVAL in metadata else fields
    if GENEVAL not in given:
        return None
    if not isinstance(given.get(STRICT, False), bool):
        reject(f"{STRICT} is a {type(given[STRICT]).__name__}, not a bool")
    return list_of(GENEVAL, _as_json(given[GENEVAL]))


def _as_json(value: Any) -> Any:
    """The same value as JSON would have it, which scorers expect: tuples become lists, bytes are refused."""
    if isinstance(value, bytes):
        reject("the metadata has bytes: send texts and numbers there")
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _prompt(task: object) -> object:
    if not isinstance(task, Mapping) or "prompt" not in task:
        reject(f"an entry of {GENEVAL} has no prompt: send one in each, or prompts")
    return task["prompt"]


def _scores(response: Response) -> bytes:
    scores = response.scores_B.tolist()
    return plain_pickle.dumps({"scores": scores, "outputs": scores})


def _verdicts(response: Response, tasks: Sequence[Metadata]) -> bytes:
    scores = response.scores_B.tolist()
    verdicts = [1.0 if score >= FULL_SCORE else 0.0 for score in scores]
    by_tag = {
        tag: [verdict if task.get("tag") == tag else OTHER_TAG for verdict, task in zip(verdicts, tasks, strict=True)]
        for tag in TAGS
    }
    return plain_pickle.dumps(
        {
            "scores": scores,
            "outputs": scores,
            "rewards": verdicts,
            "strict_rewards": verdicts,
            "group_rewards": by_tag,
            "group_strict_rewards": by_tag,
        }
    )
