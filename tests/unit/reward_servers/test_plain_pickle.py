"""Pickles of plain containers: read as Python reads them, or refused with one kind of error."""

from __future__ import annotations

import ast
import io
import pickle
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import RewardUnavailable, WireError
from reward_servers import plain_pickle
from reward_servers.limits import Patience
from reward_servers.plain_pickle import ACTIONS, MAX_ITEMS, MAX_LEVELS, MAX_OPCODES, REFUSED, dumps, loads
from tests.helpers.hostile_pickles import mutated

LIMIT = 2**20
MUTATED = 5_000
SHARED: dict[str, Any] = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": None}
PLAIN: list[Any] = [
    {"images": [b"\xff\xd8jpeg" * 60, b""], "prompts": ["a cat", "ein Käfer 猫 🐈"], "metadata": {}},
    {"images": [b"x" * 300], "meta_datas": [SHARED, SHARED, dict(SHARED)], "only_strict": True},
    {"numbers": [0, 1, 255, 256, 65_535, 65_536, -1, 2**31 - 1, -(2**31), 2**31, 2**63, 2**64 - 1, -(2**63)]},
    {"reals": [0.0, -0.5, 1e308, 3.0]},
    {"tuples": [(), (1,), (1, 2), ("a", "b", "c"), (1, 2, 3, 4)], "truth": [True, False, None]},
    {"long": ["word"] * 2_500, "texts": {f"key{number}": "x" * number for number in range(300)}},
    [], {}, "", b"", 7, None,
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_values_are_read_as_python_reads_them(value: Any, protocol: int) -> None:
    body = pickle.dumps(value, protocol)
    if protocol == 2 and "GLOBAL" in str(_opcodes(body)):
        # Protocol 2 has no bytes: Python writes a call in their place.
        with pytest.raises(WireError, match="opcode GLOBAL"):
            loads(body, LIMIT)
        return
    assert repr(loads(body, LIMIT)) == repr(value)
    assert repr(loads(bytearray(body), LIMIT)) == repr(value)


def _opcodes(body: bytes) -> list[str]:
    import pickletools

    return [opcode.name for opcode, _, _ in pickletools.genops(body)]


def test_pythons_slower_writer_is_read_too() -> None:
    """It stores values under numbers of its own, and frames them otherwise."""
    for protocol in (3, 4):
        buffer = io.BytesIO()
        pickle._Pickler(buffer, protocol).dump(PLAIN[1])  # type: ignore[attr-defined]
        assert loads(buffer.getvalue(), LIMIT) == PLAIN[1]


@pytest.mark.parametrize(
    ("value", "opcode"),
    [
        (np.array(["a", "b"]), "GLOBAL|STACK_GLOBAL"),
        (np.float32(1), "GLOBAL|STACK_GLOBAL"),
        (OrderedDict(a=1), "GLOBAL|STACK_GLOBAL"),
        (Path("a"), "GLOBAL|STACK_GLOBAL"),
        ({1, 2}, "EMPTY_SET|GLOBAL"),
        (frozenset({1}), "FROZENSET|GLOBAL"),
        (print, "GLOBAL|STACK_GLOBAL"),
        (bytearray(b"a"), "BYTEARRAY8|GLOBAL|STACK_GLOBAL"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_anything_else_is_refused_by_its_opcode(value: object, opcode: str, protocol: int) -> None:
    with pytest.raises(WireError, match=f"the opcode ({opcode}): send dicts, lists"):
        loads(pickle.dumps({"images": [b"x"], "prompts": value}, protocol), LIMIT)


def test_nothing_of_a_refused_body_runs(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for protocol in (2, 3, 4, 5):
        with pytest.raises(WireError, match="opcode"):
            loads(pickle.dumps([Attack()], protocol), LIMIT)
    assert list(tmp_path.iterdir()) == []


def test_every_opcode_of_python_is_read_or_refused_by_name() -> None:
    import pickletools

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    assert {code for code in names if code not in REFUSED} == {*ACTIONS, plain_pickle.STOP}
    assert {code: names[code] for code in REFUSED} == REFUSED


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no pickle of protocol 2 to 5"),
        (b'{"images": []}', "no pickle of protocol 2 to 5"),
        (b"\x80\x06N.", "no pickle of protocol 2 to 5"),
        (pickle.dumps({}, 0), "no pickle of protocol 2 to 5"),
        (pickle.dumps({}, 1), "no pickle of protocol 2 to 5"),
        (b"\x80\x02", "it was cut"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff].", "longer than the body"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "it was cut"),
        (b"\x80\x02X\x02\x00\x00\x00\xc3(.", "not UTF-8"),
        (b"\x80\x02.", "0 values"),
        (b"\x80\x02NN.", "2 values"),
        (b"\x80\x02N(.", "1 marks"),
        (b"\x80\x02N.N", "1 bytes follow"),
        (b"\x80\x02Na.", "empty stack"),
        (b"\x80\x02(a.", "empty stack"),
        (b"\x80\x02](\x94.", "empty stack"),
        (b"\x80\x02]e.", "a mark that is not there"),
        (b"\x80\x02](Nu.", "a key without a value"),
        (b"\x80\x02](NNu.", "as if it were a dict"),
        (b"\x80\x02}(Ne.", "as if it were a list"),
        (b"\x80\x02}NNs.", "NoneType as a key"),
        (b"\x80\x02}]Ns.", "list as a key"),
        (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "'a' twice"),
        (b"\x80\x02h\x00.", "refers to value 0"),
        (pickle.dumps(2**64, 2), "the integer 18446744073709551616: integers have 64 bits"),
        (pickle.dumps(-(2**63) - 1, 2), "the integer -9223372036854775809"),
        (b"\x80\x02\x8a\x0a" + bytes(10) + b".", "integers have 64 bits"),
        (b"\x80\x02G" + struct.pack(">d", float("nan")) + b".", "nan: send finite ones"),
        (b"\x80\x02G" + struct.pack(">d", float("inf")) + b".", "inf: send finite ones"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "under the number 4294967295"),
        (b"\x80\x02N\xfe.", "opcode 0xfe"),
        (b"\x80\x02\x80\x02N.", "opcode PROTO"),
    ],
)
def test_a_broken_pickle_says_why(body: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        loads(body, LIMIT)


def test_half_a_character_is_left_to_the_check_of_texts() -> None:
    assert loads(pickle.dumps(["\ud83d"]), LIMIT) == ["\ud83d"]


def test_a_value_cannot_contain_itself() -> None:
    itself: list[Any] = []
    itself.append(itself)
    pair: dict[str, Any] = {"a": [], "b": 1}
    pair["a"].append(pair)
    nested: list[Any] = [[]]
    nested[0].append((nested,))
    for value in (itself, pair, nested):
        for protocol in (2, 4):
            with pytest.raises(WireError, match=r"cannot contain itself|opcode POP"):
                loads(pickle.dumps(value, protocol), LIMIT)


def test_references_count_as_copies() -> None:
    """A billion of laughs: each list has its predecessor ten times."""
    value: Any = ["ha"] * 10
    for _ in range(3):
        value = [value] * 10
    assert loads(pickle.dumps(value), LIMIT) == value
    for _ in range(6):
        value = [value] * 10
    body = pickle.dumps(value)
    assert len(body) < 500
    with pytest.raises(WireError, match=f"more than {MAX_ITEMS} values"):
        loads(body, LIMIT)
    image = b"x" * 1000
    shared = pickle.dumps({"images": [image] * 12})
    assert len(shared) < 1100
    assert loads(shared, 12_006)["images"][11] == image
    with pytest.raises(WireError, match="exceed 12005 bytes"):
        loads(shared, 12_005)


def test_depth_is_bounded() -> None:
    value: Any = 0
    for _ in range(MAX_LEVELS):
        value = [value]
    assert loads(pickle.dumps(value), LIMIT) == value
    for kind in ([value], (value,), {"a": value}):
        with pytest.raises(WireError, match=f"more than {MAX_LEVELS} containers"):
            loads(pickle.dumps(kind), LIMIT)
    with pytest.raises(WireError, match=r"16 containers"):
        loads(b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b".", LIMIT)


def test_work_is_bounded() -> None:
    assert loads(pickle.dumps([1] * (MAX_ITEMS - 1)), LIMIT) == [1] * (MAX_ITEMS - 1)
    with pytest.raises(WireError, match=f"more than {MAX_ITEMS} values"):
        loads(pickle.dumps([1] * MAX_ITEMS), LIMIT)
    idle = b"\x80\x04" + b"\x95\x00\x00\x00\x00\x00\x00\x00\x00" * MAX_OPCODES + b"N."
    with pytest.raises(WireError, match=f"more than {MAX_OPCODES} opcodes"):
        loads(idle, LIMIT)


def test_reading_ends_when_nobody_waits_any_more() -> None:
    patience = Patience(60.0)
    patience.end()
    with pytest.raises(RewardUnavailable, match="not read within its deadline"):
        loads(pickle.dumps([1]), LIMIT, patience.check)


def assert_plain(value: object) -> None:
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        for one in value.values():
            assert_plain(one)
    elif type(value) in (list, tuple):
        for one in value:  # type: ignore[attr-defined]
            assert_plain(one)
    else:
        assert value is None or type(value) in (str, bytes, int, float, bool)


def test_mutated_bodies_are_read_as_python_reads_them_or_refused() -> None:
    dice = random.Random(20_261_130)
    small: list[Any] = [PLAIN[0], PLAIN[1], PLAIN[2], PLAIN[4], {"a": [1, [2, ("b", None)], {"c": b"d"}]}]
    bodies = [pickle.dumps(value, protocol) for value in small for protocol in (3, 4, 5)]
    accepted = 0
    for _ in range(MUTATED):
        body = mutated(dice.choice(bodies), dice)
        try:
            value = loads(body, LIMIT)
        except WireError:
            continue
        accepted += 1
        assert_plain(value)
        # What was accepted has no opcode that imports or calls, so Python may read it as well.
        assert repr(pickle.loads(body)) == repr(value)
    assert 200 < accepted < MUTATED - 1000


@pytest.mark.parametrize(
    "value", [{}, {"scores": [0.25, -1.5, 1e-9]}, {"a": [], "ä": {"b": ["c", 1.0]}, "d": "e" * 70_000}]
)
def test_answers_are_read_by_python(value: dict[str, Any]) -> None:
    written = dumps(value)
    assert pickle.loads(written) == value
    assert loads(written, LIMIT) == value


def test_what_no_answer_has_is_not_written() -> None:
    with pytest.raises(TypeError, match="a int is not written"):
        dumps({"a": 1})


def test_the_reader_itself_imports_no_unpickler() -> None:
    tree = ast.parse(Path(plain_pickle.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    allowed = {"__future__", "math", "struct", "collections.abc", "dataclasses", "typing"}
    assert imported <= allowed | {"common.errors", "common.strict_json", "reward_servers.picture_files"}
