"""Bytes between processes: msgpack with raw array buffers for messages, safetensors for weights. Never pickle.

A message is a dict of scalars, strings, bytes, lists, dicts and numpy arrays. An array travels as one msgpack extension
holding `[dtype, shape, raw little-endian buffer]`, so no text encoding and no parsing stands between two arrays.
Reading is strict: sizes, depth and dtypes are bounded before anything is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash
from safetensors import SafetensorError

from common.errors import WireError

AnyArray = npt.NDArray[Any]

ARRAY_EXTENSION = 1
ARRAY_DTYPES = ("uint8", "float16", "float32", "int64")
MAX_ARRAY_RANK = 8
# Deep enough for metadata, shallow enough that a hostile message cannot exhaust the stack of a reader.
MAX_DEPTH = 16
# msgpack reserves room for a list before it reads it: without this bound, a few nested headers claim gigabytes.
MAX_LIST_ITEMS = 16_384
DEFAULT_MAX_BYTES = 256 * 2**20


def pack(message: Mapping[str, Any]) -> bytes:
    """Encode a message; WireError names the first value that cannot travel."""
    _check_value(message, "message", depth=0)
    try:
        packed: bytes = msgpack.packb(message, default=_encode_array, strict_types=False)
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"a message cannot be packed: {error}") from error
    return packed


def unpack(data: bytes, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Any]:
    """Decode a message; its arrays are writable copies. WireError on anything that `pack` would not have written."""
    if len(data) > max_bytes:
        raise WireError(f"a message of {len(data)} bytes exceeds the limit of {max_bytes}: send fewer images at once")
    message = _unpackb(data, _decode_array)
    if not isinstance(message, dict):
        raise WireError(f"a message is a map at its top, this one is a {type(message).__name__}")
    _check_value(message, "message", depth=0)
    return message


def weights_to_bytes(weights: Mapping[str, AnyArray]) -> bytes:
    """Encode named tensors as safetensors."""
    # safetensors reads the buffer as it lies in memory: a transposed view would silently be saved scrambled.
    contiguous = {name: np.require(tensor, requirements="C") for name, tensor in weights.items()}
    return safetensors.numpy.save(contiguous)


def weights_from_bytes(data: bytes) -> dict[str, AnyArray]:
    """Decode safetensors into writable arrays; WireError when truncated, corrupt or of a dtype numpy lacks."""
    try:
        return safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise WireError(f"{len(data)} bytes are not valid safetensors weights: {error}") from error


def tensor_hashes(weights: Mapping[str, AnyArray]) -> dict[str, str]:
    """Hash every tensor (xxh3-128, hex) over its dtype, shape and contents."""
    return {name: _tensor_hash(tensor) for name, tensor in weights.items()}


def fingerprint(hashes: Mapping[str, str]) -> str:
    """One hash (xxh3-128, hex) for a set of named tensor hashes, whatever their order."""
    lines = "".join(f"{name}:{digest}\n" for name, digest in sorted(hashes.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()


def _tensor_hash(tensor: AnyArray) -> str:
    state = xxhash.xxh3_128(f"{tensor.dtype.str}{tensor.shape}".encode())
    state.update(np.require(tensor, requirements="C").data)
    return state.hexdigest()


def _encode_array(value: object) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray):
        raise WireError(f"a value of type {type(value).__name__} cannot travel")
    little_endian = value.astype(value.dtype.newbyteorder("<"), copy=False)
    content = msgpack.packb([value.dtype.name, list(value.shape), little_endian.tobytes()])
    return msgpack.ExtType(ARRAY_EXTENSION, content)


def _decode_array(code: int, content: bytes) -> AnyArray:
    if code != ARRAY_EXTENSION:
        raise WireError(f"msgpack extension {code} is unknown")
    parts = _unpackb(content, _refuse_extension)
    if not isinstance(parts, list) or [type(part) for part in parts] != [str, list, bytes]:
        raise WireError("an array is [dtype, shape, buffer]")
    name, shape, buffer = parts
    if name not in ARRAY_DTYPES:
        raise WireError(f"array dtype {name!r} is not one of {', '.join(ARRAY_DTYPES)}")
    if len(shape) > MAX_ARRAY_RANK or any(type(size) is not int or size < 0 for size in shape):
        raise WireError(f"array shape {shape} is not at most {MAX_ARRAY_RANK} non-negative integers")
    dtype = np.dtype(name).newbyteorder("<")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if expected != len(buffer):
        raise WireError(f"an array of shape {shape} and dtype {name} takes {expected} bytes, {len(buffer)} came")
    return np.frombuffer(buffer, dtype=dtype).reshape(shape).astype(name)


def _refuse_extension(code: int, content: bytes) -> AnyArray:
    raise WireError(f"msgpack extension {code} ({len(content)} bytes) inside an array")


def _unpackb(data: bytes, extension_hook: Any) -> Any:
    try:
        return msgpack.unpackb(
            data, ext_hook=extension_hook, max_array_len=MAX_LIST_ITEMS, max_map_len=MAX_LIST_ITEMS, strict_map_key=True
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"not a valid msgpack message: {error or type(error).__name__}") from error


def _check_value(value: object, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise WireError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, np.ndarray):
        if value.dtype.name not in ARRAY_DTYPES:
            raise WireError(f"{where}: array dtype {value.dtype} is not one of {', '.join(ARRAY_DTYPES)}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WireError(f"{where}: key {key!r} is not a string")
            _check_value(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_value(item, f"{where}[{index}]", depth + 1)
    elif type(value) not in {type(None), bool, int, float, str, bytes}:
        raise WireError(f"{where}: a value of type {type(value).__name__} cannot travel")
