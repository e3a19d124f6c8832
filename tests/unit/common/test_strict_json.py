"""JSON as the standard has it: what Python reads beyond it is refused, with one kind of error."""

from __future__ import annotations

import re

import pytest

from common import strict_json


def test_values_are_those_of_json() -> None:
    text = '{"a": [1, -0.5, 1e3, true, null, "\\ud83c\\udf89"], "b": 18446744073709551615, "c": -9223372036854775808}'
    expected = {"a": [1, -0.5, 1000.0, True, None, "🎉"], "b": 2**64 - 1, "c": -(2**63)}
    assert (
        strict_json.parse(text)
        == strict_json.parse(text.encode())
        == strict_json.parse(bytearray(text.encode()))
        == expected
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("NaN", "NaN is no number of JSON: leave it out or write null"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("1e999", "the number 1e999 is too large"),
        ("-9223372036854775809", "the number -9223372036854775809 has more than 64 bits: write it as text"),
        ("18446744073709551616", "the number 18446744073709551616 has more than 64 bits"),
        ("9" * 5000, "the number 999999999999999999999999 has more than 64 bits"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "can't decode byte 0xff"),
    ],
)
def test_everything_else_is_one_kind_of_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        strict_json.parse(text)


def test_a_key_that_is_given_twice_is_refused() -> None:
    many = ",".join(f'"{number}":0' for number in range(200_000))
    with pytest.raises(ValueError, match=r"^key '199999' is given twice$"):  # in one pass: pairs would take minutes
        strict_json.parse(f'{{{many},"199999":1}}')
    with pytest.raises(ValueError, match=r"^key 'prompt' is given twice$"):
        strict_json.parse('{"prompt": "a", "prompt": "b"}')
