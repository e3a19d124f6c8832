"""Bytes between processes: msgpack with raw array buffers for messages, safetensors for weights. Never pickle.

A message is a dict of scalars, strings, bytes, lists, dicts and numpy arrays. An array is one msgpack extension that
contains `[dtype, shape, raw little-endian buffer]`, so arrays need no text encoding and no parsing. Reading is strict:
sizes, depth and dtypes are checked before content is used, and an array's shape can be refused before its buffer is
read. Everything but the arrays of the top map counts as text and is bounded: otherwise a hostile message of megabytes
of nested lists would become gigabytes of objects.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash
from safetensors import SafetensorError

from common.errors import WireError

AnyArray = npt.NDArray[Any]
ArrayCheck = Callable[[str, tuple[int, ...]], None]
"""A check is called with an array's dtype name and shape before the array is read; it raises to refuse the array."""
Container = TypeVar("Container", list[Any], dict[Any, Any])

ARRAY_EXTENSION = 1
ARRAY_DTYPES = ("uint8", "float16", "float32", "int64")
MAX_ARRAY_RANK = 8
MAX_DEPTH = 16
"""This is deep enough for metadata and too shallow for a hostile message to exhaust a reader's stack."""
MAX_LIST_ITEMS = 16_384
"""msgpack reserves memory for a list before it reads it: without this limit, a few nested headers claim gigabytes."""
MAX_ITEMS = 65_536
"""All lists and maps of a message together hold at most this many items.

One byte of text can be a list, whose object takes seventy bytes.
"""
MAX_FIELDS = 16
"""The top map has at most this many fields; no message of ours has half as many."""
MAX_TEXT_BYTES = 2**20
"""Everything but the arrays of the top map (names, prompts, metadata) has at most this many bytes."""
MAX_NAME_BYTES = 256
QUOTED_CHARACTERS = 40
"""An error that refuses a hostile name quotes this many of its characters."""
DEFAULT_MAX_BYTES = 256 * 2**20
ARRAY_HEADER_BYTES = 128
"""The longest possible [dtype, shape] of an array fits into this, with room to spare."""
MAX_ARRAY_BYTES = 2**32 - ARRAY_HEADER_BYTES
SCALARS = frozenset({type(None), bool, int, float, str, bytes})
# Type markers of msgpack, and the number of length bytes that follow each.
SMALL_MAPS = range(0x80, 0x90)
MAP_16 = 0xDE
BIN_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
# Extensions of a fixed length (at most 16 bytes) cannot hold a useful array: they are read as text.
EXTENSION_LENGTH_BYTES = {0xC7: 1, 0xC8: 2, 0xC9: 4}


def pack(message: Mapping[str, Any]) -> bytes:
    """Encode a message, copying its arrays once; WireError names the first value that cannot be encoded."""
    if len(message) > MAX_FIELDS:
        raise WireError(f"a message of {len(message)} fields cannot travel: at most {MAX_FIELDS} at its top")
    _check_value(message, "message")
    packer = msgpack.Packer(default=_pack_nested_array)
    parts: list[bytes | memoryview] = [packer.pack_map_header(len(message))]
    try:
        for name, value in message.items():
            parts.append(packer.pack(name))
            parts += _array_parts(value) if isinstance(value, np.ndarray) else [packer.pack(value)]
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"a message cannot be packed: {error}") from error
    return b"".join(parts)


def unpack(
    data: bytes | bytearray, max_bytes: int = DEFAULT_MAX_BYTES, check_array: ArrayCheck | None = None
) -> dict[str, Any]:
    """Decode a message; WireError on anything that `pack` would not have written.

    Its arrays are writable. Arrays of uint8 in a bytearray are not copied and keep it alive; others are copied.
    """
    if len(data) > max_bytes:
        raise WireError(f"a message of {len(data)} bytes exceeds the limit of {max_bytes}: send fewer images at once")
    message = _MessageReader(memoryview(data), check_array).read()
    _check_value(message, "message")
    return message


def pack_map(message: Mapping[str, Any]) -> bytes:
    """Encode a map without the limits of a message, for another process of ours; WireError if a value cannot travel."""
    try:
        return bytes(msgpack.packb(message, default=_pack_nested_array))
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"a message cannot be packed: {error}") from error


def unpack_map(data: bytes | bytearray) -> dict[str, Any]:
    """Decode what `pack_map` wrote in another process of ours: nothing is bounded or checked."""
    message: dict[str, Any] = msgpack.unpackb(
        data, ext_hook=lambda code, content: _decode_array(code, memoryview(content), None)
    )
    return message


def weights_to_bytes(weights: Mapping[str, AnyArray]) -> bytes:
    """Encode named tensors as safetensors."""
    # safetensors reads the buffer in memory order: a transposed view would silently be saved scrambled.
    contiguous = {name: np.require(tensor, requirements="C") for name, tensor in weights.items()}
    return safetensors.numpy.save(contiguous)


def weights_from_bytes(data: bytes) -> dict[str, AnyArray]:
    """Decode safetensors into writable arrays; WireError if truncated, corrupt or of a dtype that numpy lacks."""
    try:
        return safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise WireError(f"{len(data)} bytes are not valid safetensors weights: {error}") from error


def tensor_hashes(weights: Mapping[str, AnyArray]) -> dict[str, str]:
    """Hash every tensor (xxh3-128, hex) over its dtype, shape and contents."""
    return {name: _tensor_hash(tensor) for name, tensor in weights.items()}


def fingerprint(hashes: Mapping[str, str]) -> str:
    """One hash (xxh3-128, hex) for a set of named tensor hashes, independent of their order."""
    lines = "".join(f"{name}:{digest}\n" for name, digest in sorted(hashes.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()


def _tensor_hash(tensor: AnyArray) -> str:
    state = xxhash.xxh3_128(f"{tensor.dtype.str}{tensor.shape}".encode())
    state.update(np.require(tensor, requirements="C").data)
    return state.hexdigest()


class _MessageReader:
    """Reads the top map of a message, so that its arrays are used in place and not copied by msgpack."""

    def __init__(self, data: memoryview, check_array: ArrayCheck | None) -> None:
        self._data = data
        self._position = 0
        self._text_left = MAX_TEXT_BYTES
        self._items_left = MAX_ITEMS
        self._check_array = check_array

    def read(self) -> dict[str, Any]:
        message: dict[str, Any] = {}
        for _ in range(self._read_map_header()):
            name = self._read_text(MAX_NAME_BYTES)
            if not isinstance(name, str) or name in message:
                raise WireError(f"a key of the message is {_quoted(name)}: strings, each once")
            message[name] = self._read_value()
        if self._position != len(self._data):
            raise WireError(f"{len(self._data) - self._position} bytes follow the message")
        return message

    def _read_map_header(self) -> int:
        marker = self._take(1)[0]
        fields = MAX_FIELDS + 1
        if marker in SMALL_MAPS:
            fields = marker - SMALL_MAPS.start
        elif marker == MAP_16:
            fields = int.from_bytes(self._take(2))
        if fields > MAX_FIELDS:
            raise WireError(f"a message is a map of at most {MAX_FIELDS} fields at its top")
        return fields

    def _read_value(self) -> object:
        marker = self._data[self._position] if self._position < len(self._data) else None
        if marker not in EXTENSION_LENGTH_BYTES:
            return self._read_text(self._text_left)
        self._take(1)
        length = int.from_bytes(self._take(EXTENSION_LENGTH_BYTES[marker]))
        code = self._take(1)[0]
        return _decode_array(code, self._take(length), self._check_array)

    def _read_text(self, most: int) -> object:
        """Read one value of at most `most` bytes that is not an array of the top map."""
        window = self._data[self._position : self._position + most]
        unpacker = _unpacker(
            lambda code, content: _decode_array(code, memoryview(content), self._check_array),
            list_hook=self._count_items,
            object_hook=self._count_items,
        )
        try:
            unpacker.feed(window)
            value: object = unpacker.unpack()
        except msgpack.OutOfData as error:
            if len(window) < len(self._data) - self._position:
                message = f"the parts that are not arrays exceed {MAX_TEXT_BYTES} bytes, or a name {MAX_NAME_BYTES}"
                raise WireError(f"{message}: send fewer images at once") from error
            raise WireError("the message ends too early") from error
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise WireError(f"not a valid msgpack message: {str(error) or type(error).__name__}") from error
        used: int = unpacker.tell()
        self._position += used
        self._text_left -= used
        return value

    def _count_items(self, container: Container) -> Container:
        """Count each list and map as soon as it is complete, so that most of a hostile message is never built."""
        self._items_left -= 1 + len(container)
        if self._items_left < 0:
            raise WireError(
                f"the lists and maps of a message hold more than {MAX_ITEMS} items: send fewer images at once"
            )
        return container

    def _take(self, count: int) -> memoryview:
        piece = self._data[self._position : self._position + count]
        if len(piece) < count:
            raise WireError(f"the message ends too early: {count} bytes are due, {len(piece)} are left")
        self._position += count
        return piece


def _unpacker(extension_hook: Callable[[int, bytes], AnyArray], **hooks: Callable[[Any], Any]) -> Any:
    return msgpack.Unpacker(
        ext_hook=extension_hook, max_array_len=MAX_LIST_ITEMS, max_map_len=MAX_LIST_ITEMS, strict_map_key=True, **hooks
    )


def _array_parts(array: AnyArray) -> list[bytes | memoryview]:
    """An array as a msgpack extension: a header, and its own memory if that is contiguous and little-endian."""
    little_endian = np.require(array, dtype=array.dtype.newbyteorder("<"), requirements="C")
    if array.nbytes > MAX_ARRAY_BYTES:
        raise WireError(f"an array of {array.nbytes} bytes cannot travel: at most {MAX_ARRAY_BYTES}, send fewer images")
    header = b"\x93" + msgpack.packb(array.dtype.name) + msgpack.packb(list(array.shape))
    header += struct.pack(">BI", 0xC6, array.nbytes)
    extension = struct.pack(">BIb", 0xC9, len(header) + array.nbytes, ARRAY_EXTENSION)
    return [extension + header, little_endian.reshape(-1).view(np.uint8).data]


def _pack_nested_array(value: object) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray):
        raise WireError(f"a value of type {type(value).__name__} cannot travel")
    content = msgpack.packb(
        [value.dtype.name, list(value.shape), value.astype(value.dtype.newbyteorder("<")).tobytes()]
    )
    return msgpack.ExtType(ARRAY_EXTENSION, content)


def _decode_array(code: int, content: memoryview, check_array: ArrayCheck | None) -> AnyArray:
    if code != ARRAY_EXTENSION:
        raise WireError(f"msgpack extension {code} is unknown")
    name, shape, start = _read_array_header(content)
    if name not in ARRAY_DTYPES:
        raise WireError(f"array dtype {name!r} is not one of {', '.join(ARRAY_DTYPES)}")
    if len(shape) > MAX_ARRAY_RANK or any(type(size) is not int or not 0 <= size <= MAX_ARRAY_BYTES for size in shape):
        raise WireError(
            f"array shape {shape} is not at most {MAX_ARRAY_RANK} non-negative integers of at most {MAX_ARRAY_BYTES}"
        )
    if check_array is not None:
        check_array(name, tuple(shape))
    dtype = np.dtype(name).newbyteorder("<")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if expected != len(content) - start:
        raise WireError(
            f"an array of shape {shape} and dtype {name} takes {expected} bytes, {len(content) - start} came"
        )
    try:
        array = np.frombuffer(content, dtype=dtype, offset=start).reshape(shape)
    except (ValueError, OverflowError) as error:
        # An empty buffer fits any sizes beside a 0, even sizes that numpy cannot represent.
        raise WireError(f"array shape {shape} is none: {error}") from error
    # Wider types may be at an unaligned address, which C code may not support.
    return array if array.itemsize == 1 and not content.readonly else array.astype(name)


def _read_array_header(content: memoryview) -> tuple[object, list[Any], int]:
    """Return dtype, shape and the position of the buffer, which must reach to the end."""
    unpacker = _unpacker(_refuse_extension)
    unpacker.feed(content[:ARRAY_HEADER_BYTES])
    try:
        parts, name, shape = unpacker.read_array_header(), unpacker.unpack(), unpacker.unpack()
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"not a valid array: {str(error) or type(error).__name__}") from error
    start: int = unpacker.tell()
    width = BIN_LENGTH_BYTES.get(content[start]) if start < len(content) else None
    if parts != 3 or not isinstance(shape, list) or width is None:
        raise WireError("an array is [dtype, shape, buffer]")
    begin = start + 1 + width
    length = int.from_bytes(content[start + 1 : begin])
    if length != len(content) - begin:
        raise WireError(f"an array's buffer declares {length} bytes, {len(content) - begin} came")
    return name, shape, begin


def _refuse_extension(code: int, content: bytes) -> AnyArray:
    raise WireError(f"msgpack extension {code} ({len(content)} bytes) inside an array")


def _check_value(value: object, where: str) -> None:
    """WireError that names the first part that cannot be encoded."""
    problem = _find_problem(value, depth=0)
    if problem is not None:
        raise WireError(where + problem)


def _find_problem(value: object, depth: int) -> str | None:
    """Place and reason, or None. The place is built only on the way back, because hostile lists have many places."""
    if depth > MAX_DEPTH:
        return f": nested deeper than {MAX_DEPTH} levels"
    if isinstance(value, np.ndarray):
        known = value.dtype.name in ARRAY_DTYPES
        return None if known else f": array dtype {value.dtype} is not one of {', '.join(ARRAY_DTYPES)}"
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        problem = None if wrong is None else f": key {_quoted(wrong)} is not a string"
        return problem or _find_inside(value.items(), ".{}", depth)
    if isinstance(value, list | tuple):
        return _find_inside(enumerate(value), "[{}]", depth)
    return None if type(value) in SCALARS else f": a value of type {type(value).__name__} cannot travel"


def _find_inside(items: Iterable[tuple[object, object]], place: str, depth: int) -> str | None:
    for key, item in items:
        if type(item) not in SCALARS and (problem := _find_problem(item, depth + 1)) is not None:
            return place.format(str(key)[:QUOTED_CHARACTERS]) + problem
    return None


def _quoted(name: object) -> str:
    return repr(name)[:QUOTED_CHARACTERS]
