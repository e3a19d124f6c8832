"""OpenAPI document of a server process, written by hand: bodies are binary, and every possible status is listed.

JSON Schema cannot describe raw memory. The schema of a msgpack body describes the map it decodes to; an array in it is
a msgpack extension of type 1 whose content is again msgpack: `[dtype name, shape, raw little-endian buffer]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.rewards.api import (
    ACCESS_CAUSES,
    DEADLINE_HEADER,
    DOCS_PATH,
    FLOW_GRPO_PATH,
    GRADIENT_PATH,
    HEALTH_PATH,
    INFO_FLAGS,
    INFO_PATH,
    INFO_TEXTS,
    MAX_ASPECT,
    MAX_PROMPT_BYTES,
    MEDIA_TYPE,
    METRICS_PATH,
    OPENAPI_PATH,
    PLAIN_SCORE_PATH,
    READY_PATH,
    REQUEST_CAUSES,
    RUN_HEADER,
    SCORE_PATH,
    SERVER_CAUSES,
    UNIRL_HEALTH_PATH,
    ServerInfo,
)
from common.wire import MAX_LIST_ITEMS
from reward_servers import unirl
from reward_servers.doors import PICKLE_TYPE, Door
from reward_servers.limits import RequestLimits
from reward_servers.picture_request import MAX_IMAGES

Json = dict[str, Any]

JSON_TYPE = "application/json"
ARRAY_FORMAT = "msgpack-array"
ERRORS = {
    400: "Not a message: truncated, malformed or nested too deep.",
    401: "The bearer token is missing or wrong.",
    404: "This scorer has no gradient.",
    408: "The body came at less than 64 KiB per second.",
    413: "The body, or one of its images, exceeds the server's limit.",
    415: "The body has a content-encoding: send it uncompressed.",
    422: "A message, but not a valid request.",
    429: "The queue is full, or too long for the deadline; nothing was done. Retry after Retry-After seconds.",
    431: "The head of the request is too long.",
    500: "The scorer failed or returned invalid scores.",
    503: "The model is loading again. Of readiness also: a call or a reader has outlasted all its requests.",
    504: "No answer within the deadline; the work was dropped if it had not begun.",
}
SCORE_ERRORS = (400, 408, 413, 415, 422, 429, 431, 500, 503, 504)
TEXT = {"type": "string"}
MAP = {"type": "object"}
DEADLINE_PARAMETER = {
    "name": DEADLINE_HEADER,
    "in": "header",
    "description": "Seconds after which the response is useless. The server's own limit caps it.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
RUN_PARAMETER = {
    "name": RUN_HEADER,
    "in": "header",
    "description": "Any name of the run that sends the request. Runs that share a server take turns.",
    "schema": TEXT,
}


def describe(scorers: Sequence[tuple[str, ServerInfo]], limits: RequestLimits, doors: Sequence[Door]) -> Json:
    """The document of a process that serves these scorers, each under its prefix, through these doors."""
    guarded = limits.token is not None
    paths = {
        prefix + path: item
        for prefix, info in scorers
        for path, item in (_scorer_paths(info, guarded) | _pickle_paths(info, guarded, doors)).items()
    }
    components: Json = {"schemas": SCHEMAS}
    if guarded:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    description = (
        f"Scores of images. A body has at most {limits.max_body_bytes} bytes, an image {limits.max_pixels} pixels and "
        f"sides that differ by a factor of {MAX_ASPECT}, a text {MAX_PROMPT_BYTES} bytes; "
        f"an answer comes within {limits.deadline_s:g} s. A failure is a status and a reason, never a score."
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "reward server", "version": "1", "description": description},
        "paths": paths | PROCESS_PATHS,
        "components": components,
    }


def _scorer_paths(info: ServerInfo, guarded: bool) -> Json:
    name = info.scorer
    gradient = (
        _operation(f"Score and differentiate with {name}", "GradientRequest", "GradientResponse", SCORE_ERRORS, guarded)
        if info.differentiable
        else _operation(f"{name} has no gradient", None, None, (404, 422), guarded)
    )
    return {
        SCORE_PATH: {"post": _operation(f"Score with {name}", "ScoreRequest", "ScoreResponse", SCORE_ERRORS, guarded)},
        GRADIENT_PATH: {"post": gradient},
        PLAIN_SCORE_PATH: {
            "post": _operation(f"Score with {name}, in JSON", "PlainRequest", "PlainResponse", SCORE_ERRORS, guarded)
        },
        INFO_PATH: {"get": _operation(f"The identity that {name} declares", None, "ServerInfo", (422,), guarded)},
        UNIRL_HEALTH_PATH: _page(f"The name {name}, as UniRL's client asks for it", _content("UniRLHealth")),
    }


def _pickle_paths(info: ServerInfo, guarded: bool, doors: Sequence[Door]) -> Json:
    if FLOW_GRPO_PATH not in {door.path for door in doors}:
        return {}
    summary = f"Score with {info.scorer}: pickles of plain containers, as Flow-GRPO and verl-omni send them"
    return {FLOW_GRPO_PATH: {"post": _operation(summary, "Pickle", "Pickle", SCORE_ERRORS, guarded)}}


def _operation(summary: str, request: str | None, response: str | None, errors: Sequence[int], guarded: bool) -> Json:
    responses: Json = {} if response is None else {"200": {"description": "Done."} | _content(response)}
    for status in sorted({*errors, *((401,) if guarded else ())}):
        responses[str(status)] = {"description": ERRORS[status]} | _content("Error")
    if "429" in responses:
        responses["429"]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    operation: Json = {"summary": summary, "parameters": [DEADLINE_PARAMETER, RUN_PARAMETER], "responses": responses}
    if request is not None:
        operation["requestBody"] = {"required": True} | _content(request)
    if guarded:
        operation["security"] = [{"bearer": []}]
    return operation


def _content(schema: str) -> Json:
    kind = MEDIA_TYPE if schema in MSGPACK_SCHEMAS else PICKLE_TYPE if schema == "Pickle" else JSON_TYPE
    return {"content": {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _object(required: Json, optional: Json | None = None) -> Json:
    properties = required | (optional or {})
    return MAP | {"properties": properties, "required": list(required), "additionalProperties": False}


def _array(of: str) -> Json:
    return {"type": "string", "format": ARRAY_FORMAT, "description": f"msgpack extension 1: an array, {of}"}


def _list(item: Json, most: int) -> Json:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most}


def _request(field: str, of: str) -> Json:
    metadata = {"type": "array", "items": MAP, "description": "One map for each image, or none at all."}
    return _object({field: _array(of), "prompts": _list(TEXT, MAX_LIST_ITEMS), "metadata": metadata})


BASE64_IMAGE = {"type": "string", "contentEncoding": "base64", "description": "A PNG or JPEG file."}
BOUND = {"type": ["number", "null"]}
FLAG = {"type": "boolean"}
ANSWER = {"scorer": TEXT, "weights_hash": TEXT, "scores_B": _array("float32 [B], finite")}
MANY_IMAGES = _object(
    {"images": _list(BASE64_IMAGE, MAX_IMAGES), "prompts": _list(TEXT, MAX_IMAGES)},
    {"metadata": {"anyOf": [MAP, {"type": "array", "items": MAP}, {"type": "null"}]}},
)
IDENTITY = {"type": ["string", "integer", "null"]}
UNIRL_ITEM = _object(
    {
        "history": _list(_object({"text": TEXT, "image_b64": BASE64_IMAGE}), 1),
        "required_rewards": _list(TEXT, 1),
    },
    {"metadata": {"type": ["object", "null"]}} | dict.fromkeys((*unirl.IDENTITY, unirl.SCORER_VERSION), IDENTITY),
)
UNIRL_REQUEST = _object({"requests": _list(UNIRL_ITEM, MAX_IMAGES)}, {"protocol_version": {"const": unirl.VERSION}})
UNIRL_RESPONSE = _object(
    {"protocol_version": TEXT} | dict.fromkeys(("results", "errors", "identities"), _list(MAP, MAX_IMAGES))
)
SCHEMAS: Json = {
    "ScoreRequest": _request("images_BHWC", "uint8 [B, H, W, 3], RGB"),
    "ScoreResponse": _object(ANSWER),
    "GradientRequest": _request("images_BCHW", "float32 [B, 3, H, W], RGB in [0, 1]"),
    "GradientResponse": _object(ANSWER | {"gradients_BCHW": _array("float32 [B, 3, H, W], d score_i / d image_i")}),
    "PlainRequest": {"anyOf": [MANY_IMAGES, _object({"image_base64": BASE64_IMAGE, "prompt": TEXT}), UNIRL_REQUEST]},
    "PlainResponse": {
        "anyOf": [
            _object({"scores": _list({"type": "number"}, MAX_IMAGES)}),
            _object({"score": {"type": "number"}}),
            UNIRL_RESPONSE,
        ]
    },
    "Pickle": {"type": "string", "format": "binary", "description": "reward_servers/flow_grpo.py has its fields."},
    "UniRLHealth": _object({"status": {"const": "ok"}, "rewards": MAP}),
    "ServerInfo": _object(
        dict.fromkeys(INFO_TEXTS, TEXT) | dict.fromkeys(INFO_FLAGS, FLAG) | {"low": BOUND, "high": BOUND}
    ),
    "Error": _object({"error": {"enum": [*REQUEST_CAUSES, *ACCESS_CAUSES, *SERVER_CAUSES]}, "message": TEXT}),
    "Health": _object({"alive": {"const": True}}),
    "Ready": _object({"ready": {"const": True}, "probe_scores": MAP | {"additionalProperties": {"type": "number"}}}),
    "Document": MAP,
}
MSGPACK_SCHEMAS = ("ScoreRequest", "ScoreResponse", "GradientRequest", "GradientResponse")


def _page(summary: str, content: Json, errors: Sequence[int] = ()) -> Json:
    responses = {"200": {"description": "Done."} | content}
    responses |= {str(status): {"description": ERRORS[status]} | _content("Error") for status in errors}
    return {"get": {"summary": summary, "responses": responses}}


PROCESS_PATHS: Json = {
    HEALTH_PATH: _page("The process is alive", _content("Health")),
    READY_PATH: _page("Every scorer has passed its start-up check, and no call is stuck", _content("Ready"), (503,)),
    METRICS_PATH: _page("Prometheus metrics", {"content": {"text/plain": {"schema": TEXT}}}),
    OPENAPI_PATH: _page("This document", _content("Document")),
    DOCS_PATH: _page("A page for people: routes, limits, lines to paste", {"content": {"text/html": {"schema": TEXT}}}),
}
