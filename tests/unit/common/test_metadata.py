"""Nulls in metadata: absent keys, in every prompt file and in every request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.metadata import without_nulls
from common.prompts import load_prompts
from common.rewards.api import GradientRequest, ScoreRequest
from common.wire import pack
from reward_servers.scorers.geneval.rules import Requirement, Task, parse_task

FILLED: dict[str, Any] = {
    "tag": "single_object",
    "include": [{"class": "bench", "count": 1, "color": None, "position": None}],
    "exclude": None,
}
"""GenEval's metadata as a table writes it."""
MEANT: dict[str, Any] = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}


def test_nulls_are_absent_at_any_depth_and_order_is_kept() -> None:
    given = {"z": [None, [None, 1], {"b": None, "a": 0}], "n": None, "empty": {"x": None}, "no": False, "t": ("", 0.0)}
    kept = without_nulls(given)
    assert kept == {"z": [[1], {"a": 0}], "empty": {}, "no": False, "t": ["", 0.0]}
    assert list(kept) == ["z", "empty", "no", "t"]
    assert given["z"] == [None, [None, 1], {"b": None, "a": 0}]


def test_deep_nesting_is_no_error() -> None:
    deep: dict[str, Any] = {"end": None}
    for _ in range(100_000):
        deep = {"a": deep}
    kept = without_nulls(deep)
    for _ in range(100_000):
        kept = kept["a"]
    assert kept == {}


def test_a_table_as_jsonl_has_the_metadata_that_it_means(tmp_path: Path) -> None:
    path = tmp_path / "geneval.jsonl"
    path.write_text(json.dumps({"prompt": "a photo of a bench", **FILLED}) + "\n")
    found = load_prompts(path)[0].metadata
    assert found == MEANT
    assert parse_task(found) == Task("single_object", (Requirement("bench", 1),), ())


def test_a_null_does_not_replace_a_value_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "nested.jsonl"
    path.write_text(json.dumps({"prompt": "a", "tag": "colors", "metadata": {"tag": None, "size": 2}}) + "\n")
    assert load_prompts(path)[0].metadata == {"tag": "colors", "size": 2}


def test_a_null_in_json_does_not_replace_a_column_of_parquet(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "a", "tag": "colors", "metadata": '{"tag": null, "size": 2, "include": [{"color": null}]}'}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet")[0].metadata == {"tag": "colors", "size": 2, "include": [{}]}


@pytest.mark.parametrize(
    ("kind", "images"),
    [
        (ScoreRequest, {"images_BHWC": np.zeros((2, 4, 4, 3), np.uint8)}),
        (GradientRequest, {"images_BCHW": np.zeros((2, 3, 4, 4), np.float32)}),
    ],
)
def test_requests_leave_nulls_out_when_they_are_read(kind: type[Any], images: dict[str, Any]) -> None:
    sent = pack({**images, "prompts": ["a", "b"], "metadata": [FILLED, FILLED]})
    assert kind.from_bytes(sent).metadata == [MEANT, MEANT]
    shared = kind(**images, prompts=["a", "b"], metadata=[FILLED] * 2).metadata
    assert shared[0] is shared[1]
