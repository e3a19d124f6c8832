from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest

from common.errors import WireError
from common.wire import (
    ARRAY_EXTENSION,
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_ITEMS,
    MAX_TEXT_BYTES,
    fingerprint,
    pack,
    tensor_hashes,
    unpack,
    weights_from_bytes,
    weights_to_bytes,
)


def array_bytes(dtype: Any, shape: Any, data: Any) -> bytes:
    return msgpack.packb({"a": msgpack.ExtType(ARRAY_EXTENSION, msgpack.packb([dtype, shape, data]))})


def test_a_message_survives_the_trip() -> None:
    message = {"text": "café 東京", "number": 3, "real": 0.1, "flag": True, "none": None, "raw": b"\x00\xff"}
    message |= {"list": [1, "two", [3.0]], "map": {"deep": {"er": []}}}
    assert unpack(pack(message)) == message


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "int64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_an_array_survives_bit_by_bit_and_is_writable(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    back = unpack(pack({"a": array}))["a"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.writeable


def test_views_and_foreign_byte_order_arrive_as_what_they_mean() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    message = unpack(pack({"transposed": array.T, "big": array.astype(">f4")}))
    np.testing.assert_array_equal(message["transposed"], array.T)
    np.testing.assert_array_equal(message["big"], array)


def test_not_a_number_travels_as_itself() -> None:
    message = unpack(pack({"a": np.array([np.nan, np.inf], dtype=np.float32), "b": math.nan}))
    assert np.isnan(message["a"][0])
    assert math.isnan(message["b"])


@pytest.mark.parametrize(
    "value",
    [np.array(["text"]), np.array([object()]), np.zeros(2, np.complex64), object(), {1: 2}, {1, 2}, 2**70, "\ud800"],
    ids=["str array", "object array", "complex", "object", "int key", "set", "huge int", "lone surrogate"],
)
def test_what_cannot_travel_is_refused_by_the_sender(value: object) -> None:
    with pytest.raises(WireError):
        pack({"field": value})


def test_the_refusal_names_the_place() -> None:
    with pytest.raises(WireError, match=r"message\.metadata\[1\]\.deep"):
        pack({"metadata": [{}, {"deep": object()}]})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        pack({"a": 1})[:-1],
        pack({"a": 1}) + b"\x00",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        b"\x91" * 5000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb({"a": msgpack.ExtType(5, b"")}),
        msgpack.packb({"a": msgpack.Timestamp(0)}),
        b"\x81\xa1a\xa2\xff\xfe",
        array_bytes("object", [1], b"12345678"),
        array_bytes("float32", [2], b"1234"),
        array_bytes("float32", [-1, -1], b"1234"),
        array_bytes("float32", [2**40, 2**40], b"1234"),
        array_bytes("float32", [1.0], b"1234"),
        array_bytes("float32", [True], b"1234"),
        array_bytes("float32", [1] * 9, b"1234"),
        array_bytes("float32", "x", b"1234"),
        array_bytes("uint8", [1], "text"),
        msgpack.packb({"a": msgpack.ExtType(ARRAY_EXTENSION, b"\xc1")}),
        msgpack.packb({"a": msgpack.ExtType(ARRAY_EXTENSION, msgpack.packb(msgpack.ExtType(ARRAY_EXTENSION, b"")))}),
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack(data)


def test_size_and_depth_are_bounded() -> None:
    data = pack({"a": "x" * 100})
    assert unpack(data, max_bytes=len(data)) == {"a": "x" * 100}
    with pytest.raises(WireError, match="exceeds the limit"):
        unpack(data, max_bytes=len(data) - 1)
    nested: list[Any] = []
    for _ in range(MAX_DEPTH):
        nested = [nested]
    with pytest.raises(WireError, match="nested deeper"):
        pack({"a": nested})
    with pytest.raises(WireError, match="nested deeper"):
        unpack(msgpack.packb({"a": nested}))


def test_weights_survive_even_as_transposed_views() -> None:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.float16([1.5]), "c": np.zeros((0, 2), "f4")}
    back = weights_from_bytes(weights_to_bytes(weights))
    assert {name: (value.dtype, value.shape) for name, value in back.items()} == {
        name: (value.dtype, value.shape) for name, value in weights.items()
    }
    np.testing.assert_array_equal(back["a"], weights["a"])
    assert tensor_hashes(back) == tensor_hashes(weights)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_truncated_weights_are_refused(cut: int) -> None:
    data = weights_to_bytes({"a": np.ones(8, np.float32)})
    with pytest.raises(WireError, match="safetensors"):
        weights_from_bytes(data[:cut])


def test_a_hash_sees_contents_dtype_and_shape() -> None:
    zeros = [np.zeros((2, 3), "f4"), np.zeros((3, 2), "f4"), np.zeros((2, 3), "i4"), np.ones((2, 3), "f4")]
    digests = {tensor_hashes({"a": array})["a"] for array in zeros}
    assert len(digests) == len(zeros)
    assert all(len(digest) == 32 for digest in digests)


def test_a_fingerprint_ignores_order_but_not_names() -> None:
    hashes = {"a": "1", "b": "2"}
    assert fingerprint(hashes) == fingerprint(dict(reversed(hashes.items())))
    assert fingerprint(hashes) != fingerprint({"a": "2", "b": "1"})
    assert fingerprint({}) != fingerprint({"a": "1"})


def test_bytes_stay_where_they_lie_in_a_body_and_wider_numbers_are_aligned() -> None:
    body = bytearray(pack({"bytes": np.arange(9, dtype=np.uint8), "floats": np.arange(3, dtype=np.float32)}))
    message = unpack(body)
    body[body.index(b"\x00\x01\x02\x03")] = 77
    assert message["bytes"][0] == 77
    assert message["floats"].flags.aligned
    assert message["floats"].tolist() == [0.0, 1.0, 2.0]


def test_a_shape_can_be_refused_before_its_buffer_is_looked_at() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def refuse(dtype: str, shape: tuple[int, ...]) -> None:
        seen.append((dtype, shape))
        raise WireError("too many pixels")

    with pytest.raises(WireError, match="too many pixels"):
        unpack(array_bytes("uint8", [1, 2**20, 2**20, 3], b""), check_array=refuse)
    assert seen == [("uint8", (1, 2**20, 2**20, 3))]


def test_text_is_bounded_on_its_own() -> None:
    most = "x" * (MAX_TEXT_BYTES - 100)
    assert unpack(pack({"a": most}))["a"] == most
    with pytest.raises(WireError, match="that are not arrays"):
        unpack(msgpack.packb({"a": most, "b": "y" * 200}))
    with pytest.raises(WireError, match="that are not arrays"):
        unpack(msgpack.packb({"n" * 300: 1}))


def test_a_field_comes_once() -> None:
    with pytest.raises(WireError, match="each once"):
        unpack(b"\x82\xa1a\x01\xa1a\x02")


@pytest.mark.parametrize(
    "shape", [[2**63 - 1, 2**63 - 1, 0], [2**64 - 1, 0, 1, 3], [2**32, 0], [2**32 - 200] * 7 + [0]]
)
def test_an_empty_buffer_does_not_excuse_absurd_sizes(shape: list[int]) -> None:
    """Their product is 0, which is what the buffer holds, but no array can have them."""
    with pytest.raises(WireError, match="array shape"):
        unpack(array_bytes("uint8", shape, b""))
    assert unpack(array_bytes("uint8", [0] * 8, b""))["a"].shape == (0,) * 8


def test_the_top_map_has_few_fields() -> None:
    fields = {str(number): number for number in range(MAX_FIELDS)}
    assert unpack(pack(fields)) == fields
    with pytest.raises(WireError, match="17 fields cannot travel: at most 16"):
        pack(fields | {"more": 1})
    for count in (MAX_FIELDS + 1, 65_535, 65_536):
        with pytest.raises(WireError, match="at most 16 fields"):
            unpack(msgpack.packb(dict.fromkeys(map(str, range(count)))))


def test_lists_and_maps_are_bounded_together_before_all_of_them_are_built() -> None:
    half = [[] for _ in range(MAX_ITEMS // 8)]
    accepted = {"a": half, "b": [half, half], "c": [{"d": 1}]}
    assert unpack(msgpack.packb(accepted)) == accepted
    crowds = [
        {"a": [[[]] * 16_000] * 8},
        {"a": [{"b": 1}] * 16_000, "c": [{"b": 1}] * 16_000, "d": [[]] * 16_000},
    ]
    for crowd in crowds:
        with pytest.raises(WireError, match="more than 65536 items"):
            unpack(msgpack.packb(crowd))


def test_hostile_names_are_not_quoted_whole() -> None:
    for data in (
        msgpack.packb({"n" * 200: 1, "a": {b"k" * 200: 1}}),
        b"\x82" + 2 * (msgpack.packb("n" * 200) + b"\x01"),
        msgpack.packb({"n" * 200: {"m" * 200: [msgpack.Timestamp(0)]}}),
    ):
        with pytest.raises(WireError) as caught:
            unpack(data)
        assert len(str(caught.value)) < 200


def test_bytes_that_are_no_msgpack_are_refused_with_a_reason() -> None:
    with pytest.raises(WireError, match=r"^not a valid msgpack message: \w+"):
        unpack(b"\x81\xa1a\xc1")
