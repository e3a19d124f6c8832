"""The OpenAPI document is true: schemathesis asks what it describes of a real server, and compares every answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import msgpack
import numpy as np
import pytest
from hypothesis import strategies

from common.rewards.api import MEDIA_TYPE, OPENAPI_PATH
from common.wire import ARRAY_EXTENSION
from reward_servers.openapi import ARRAY_FORMAT
from tests.integration.test_reward_servers import BRIGHTNESS, MISCHIEF, running

schemathesis = pytest.importorskip("schemathesis")
conformance = pytest.importorskip("schemathesis.specs.openapi.checks")

TOKEN = "sesame"
EXAMPLES = 60
CHECKS = [
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]
SHAPES = {"images_BHWC": ("uint8", (1, 2, 3, 3)), "images_BCHW": ("float32", (1, 3, 2, 2))}


@schemathesis.serializer(MEDIA_TYPE)
def to_msgpack(context: Any, value: Any) -> bytes:
    """A value made from the schema; an array that the schema does not describe further becomes zeros."""
    if isinstance(value, dict):
        value = {name: array(*SHAPES[name]) if name in SHAPES and item == "" else item for name, item in value.items()}
    return msgpack.packb(value, default=str, unicode_errors="replace")


def array(dtype: str, shape: tuple[int, ...]) -> msgpack.ExtType:
    return msgpack.ExtType(ARRAY_EXTENSION, msgpack.packb([dtype, shape, np.zeros(shape, dtype).tobytes()]))


schemathesis.openapi.format(ARRAY_FORMAT, strategies.sampled_from(["", "", "not an array"]))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ("--scorer", BRIGHTNESS, "--scorer", MISCHIEF, "--max-body-mb", "1", "--accept-flow-grpo")
    with running(tmp_path_factory.mktemp("server"), *options, REWARD_SERVER_TOKEN=TOKEN) as (base, _):
        yield base


def test_answers_are_those_of_the_document(url: str) -> None:
    asked: set[str] = set()
    for result in schemathesis.openapi.from_url(url + OPENAPI_PATH).get_all_operations():
        operation = result.ok()

        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.headers["authorization"] = f"Bearer {TOKEN}"
            answer = case.call()
            # A deadline of a microsecond is missed, and says so; a failure of the server's own is never excused.
            assert answer.status_code not in (500, 502, 503), answer.text
            case.validate_response(answer, checks=CHECKS)

        ask()
        asked.add(f"{operation.method.upper()} {operation.path}")
    assert {
        "POST /brightness/v1/score",
        "POST /mischief/v1/gradient",
        "POST /brightness/score",
        "POST /brightness/",
        "GET /metrics",
    } <= asked


def test_every_guarded_route_of_the_document_asks_for_the_token(url: str) -> None:
    document = httpx.get(url + OPENAPI_PATH).json()
    guarded = [
        (method, path)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "security" in operation
    ]
    assert len(guarded) == 10
    for method, path in guarded:
        answer = httpx.request(method, url + path)
        assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
