"""Prompts in parquet: the same prompts and metadata as in .jsonl, and what is refused."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import PromptError
from common.prompts import load_prompts
from common.types import Prompt

# GenEval's lines: keys that only some objects have.
GENEVAL: list[dict[str, Any]] = [
    {"prompt": "a photo of a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]},
    {
        "prompt": "a photo of a red cup",
        "tag": "colors",
        "include": [{"class": "cup", "count": 1, "color": "red"}],
        "exclude": [{"class": "cat", "count": 1}],
    },
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    keys = dict.fromkeys(key for row in rows for key in row)
    parquet.write_table(pa.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows]), path)
    return path


def test_metadata_is_that_of_jsonl(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(map(json.dumps, GENEVAL)))
    found = load_prompts(write(tmp_path / "prompts.parquet", GENEVAL))
    assert found == load_prompts(lines)
    assert found[1].metadata["include"] == [{"class": "cup", "count": 1, "color": "red"}]


def test_what_fits_no_column_stands_as_json(tmp_path: Path) -> None:
    extra = {"include": [{"class": "cup", "position": ["left of", 0]}]}
    path = write(tmp_path / "p.parquet", [{"prompt": " a cup ", "tag": "position", "metadata": json.dumps(extra)}])
    assert load_prompts(path) == [Prompt(0, "a cup", {"tag": "position", **extra})]


def test_integers_of_64_bits_are_those_of_jsonl(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "prompt": pa.array(["a"]),
        "most": pa.array([2**64 - 1], pa.uint64()),
        "least": pa.array([-(2**63)], pa.int64()),
    }
    path = tmp_path / "prompts.PARQUET"
    parquet.write_table(pa.table(columns), path)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "most": 18446744073709551615, "least": -9223372036854775808}')
    assert load_prompts(path) == load_prompts(lines) == [Prompt(0, "a", {"most": 2**64 - 1, "least": -(2**63)})]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, 'row 2 has no "prompt" text; its columns are prompt, text'),
        ({"prompt": " "}, 'row 2 has no "prompt" text'),
        ({"prompt": "a", "when": datetime.date(2026, 1, 1)}, "row 2 has metadata that JSON cannot represent, 'when': "),
        ({"prompt": "a", "share": float("nan")}, "row 2 has metadata that JSON cannot represent, 'share': "),
        ({"prompt": "a", "metadata": "{"}, 'row 2: its "metadata" is text, but not JSON'),
        ({"prompt": "a", "metadata": "[1]"}, 'row 2: its "metadata" is JSON, but no object: [1]'),
        ({"prompt": "a", "data": b"x"}, "row 2 has metadata that JSON cannot represent, 'data': "),
        ({"prompt": "a", "price": decimal.Decimal("1.5")}, "row 2 has metadata that JSON cannot represent, 'price': "),
        ({"prompt": "a\0b"}, "row 2 has the control character U+0000"),
        (
            {"prompt": "a", "metadata": '{"tag": "\\ud83c"}'},
            "row 2 is not accepted by reward servers: the text '\\ud83c'",
        ),
        (
            {"prompt": "a", "metadata": '{"share": NaN}'},
            'row 2: its "metadata" is text, but not JSON: NaN is no number',
        ),
        ({"prompt": "a", "metadata": "[" * 100_000}, 'row 2: its "metadata" is text, but not JSON: nested too deeply'),
        ({"prompt": "\u200b"}, 'row 2 has no "prompt" text'),
        ({"prompt": "x" * 20_001}, "row 2 is a prompt of 20,001 characters"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": "fine"}, row])
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_a_table_of_other_columns_names_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"caption": "a", "url": "b"}])
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value) == f'{path}: row 1 has no column "prompt"; rename one of its columns: caption, url'


def test_a_conversation_is_no_prompt(tmp_path: Path) -> None:
    """As data sets for chat models have it."""
    path = write(tmp_path / "p.parquet", [{"prompt": [{"role": "user", "content": "a red cat"}]}])
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value) == (
        f'{path}: row 1 has a list in "prompt", which is no text: write what to draw in that column'
    )


def test_the_row_numbers_of_pandas_are_no_metadata(tmp_path: Path) -> None:
    """A table that was filtered has them as one more column, or several."""
    rows = [
        {"prompt": text, "tag": "x", "__index_level_0__": number, "__index_level_1__": 0, "my__index_level_0__": 1}
        for number, text in ((5, "a"), (7, "b"))
    ]
    metadata = {"tag": "x", "my__index_level_0__": 1}
    assert load_prompts(write(tmp_path / "p.parquet", rows)) == [Prompt(0, "a", metadata), Prompt(1, "b", metadata)]


def test_files_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(PromptError, match="no such prompt file"):
        load_prompts(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("a red circle\n")
    with pytest.raises(PromptError, match="not a parquet file that can be read"):
        load_prompts(tmp_path / "text.parquet")
    with pytest.raises(PromptError, match="no prompts in it"):
        load_prompts(write(tmp_path / "empty.parquet", [{"prompt": "a"}][:0]))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1")
    with pytest.raises(PromptError, match=r"pyarrow is needed: pip install -e '\.\[parquet\]', or .* \.jsonl"):
        load_prompts(tmp_path / "prompts.parquet")


def test_values_that_are_no_text_or_no_date_are_named_by_their_row(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    # Arrow does not check that text is UTF-8: here half of a surrogate pair in CESU-8, and Latin-1.
    for wrong in (b"a cat \xed\xa0\xbc", b"caf\xe9"):
        values = [b"fine", b"fine", wrong]
        offsets = pa.py_buffer(np.cumsum([0, *map(len, values)]).astype(np.int32))
        texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"".join(values))])
        path = tmp_path / "text.parquet"
        parquet.write_table(pa.table({"prompt": texts}), path)
        with pytest.raises(PromptError, match="row 3 cannot be read: 'utf-8' codec"):
            load_prompts(path)
    days = pa.array([0, 2**30], pa.int32()).cast(pa.date32())
    path = tmp_path / "date.parquet"
    parquet.write_table(pa.table({"prompt": ["a", "b"], "when": days}), path)
    with pytest.raises(PromptError, match="row 2 cannot be read: "):
        load_prompts(path)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "twice.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(PromptError, match="not a parquet file that can be read: Multiple matches"):
        load_prompts(path)
