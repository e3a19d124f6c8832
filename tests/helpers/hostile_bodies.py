"""Request bodies made to hurt a reward server: damaged messages, lies about sizes, bombs. All from a seed."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgpack
import numpy as np
from PIL import Image

from common.rewards.api import (
    GRADIENT_PATH,
    MAX_ASPECT,
    PLAIN_SCORE_PATH,
    SCORE_PATH,
    GradientRequest,
    ScoreRequest,
)
from common.wire import ARRAY_EXTENSION

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
# In quotes, so that a reader of texts scores it as well.
PROMPT = 'say "a"'
SCORE = ScoreRequest(IMAGES, [PROMPT, PROMPT], [{"n": 1}, {}]).to_bytes()
GRADIENT = GradientRequest(np.full((1, 3, 4, 4), 0.5, np.float32), [PROMPT]).to_bytes()


@dataclass(frozen=True)
class Hostile:
    """A body, where it is sent, and whether it may by chance still be a valid request."""

    kind: str
    path: str
    body: bytes
    may_be_valid: bool = False


def hostile_bodies(count: int, seed: int, large: int, leave_out: str = "") -> Iterator[Hostile]:
    """`count` bodies of all kinds but one; oversized ones have `large` bytes: that must exceed the server's limit."""
    draw = random.Random(seed)
    kinds = [name for name in KINDS if name != leave_out]
    weights = [SLOW.get(name, 1.0) for name in kinds]
    names = [*kinds, *draw.choices(kinds, weights, k=count - len(kinds))]
    for name in names:
        path, body = KINDS[name](draw, large)
        yield Hostile(name, path, body, may_be_valid=name in MAY_BE_VALID)


def _message(draw: random.Random) -> tuple[str, bytes]:
    return draw.choice([(SCORE_PATH, SCORE), (GRADIENT_PATH, GRADIENT), (PLAIN_SCORE_PATH, _plain(_png(IMAGES[0])))])


def _plain(*files: bytes) -> bytes:
    encoded = [base64.b64encode(file).decode() for file in files]
    return json.dumps({"images": encoded, "prompts": [PROMPT] * len(files)}).encode()


def _png(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def _truncated(draw: random.Random, large: int) -> tuple[str, bytes]:
    path, body = _message(draw)
    return path, body[: draw.randrange(len(body))]


def _extended(draw: random.Random, large: int) -> tuple[str, bytes]:
    path, body = _message(draw)
    return path, body + draw.randbytes(draw.randint(1, 64)) + b"\xff"


def _flipped(draw: random.Random, large: int) -> tuple[str, bytes]:
    path, body = _message(draw)
    damaged = bytearray(body)
    for _ in range(draw.randint(1, 8)):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    return path, bytes(damaged)


def _noise(draw: random.Random, large: int) -> tuple[str, bytes]:
    path, _ = _message(draw)
    # 0xc1 begins no msgpack value and no JSON.
    return path, b"\xc1" + draw.randbytes(draw.randint(0, 2000))


def _oversized(draw: random.Random, large: int) -> tuple[str, bytes]:
    path, body = _message(draw)
    return path, body + bytes(large - len(body))


def _array(dtype: object, shape: object, buffer: object) -> msgpack.ExtType:
    return msgpack.ExtType(ARRAY_EXTENSION, msgpack.packb([dtype, shape, buffer]))


def _wrong_dtype(draw: random.Random, large: int) -> tuple[str, bytes]:
    dtype = draw.choice(["float64", "object", "int64", "float16", "<U4", "", 3, None, "uint8\x00", "complex64", "O"])
    array = _array(dtype, [1, 2, 2, 3], bytes(12 * draw.choice([1, 2, 4, 8])))
    return SCORE_PATH, msgpack.packb({"images_BHWC": array, "prompts": ["a"], "metadata": []})


def _huge_shape(draw: random.Random, large: int) -> tuple[str, bytes]:
    sizes = [draw.choice([0, -1, 2**31, 2**63 - 1, 2**40, 3.5, True, 10**6]) for _ in range(draw.randint(0, 12))]
    array = _array("uint8", sizes or 7, draw.randbytes(12))
    return SCORE_PATH, msgpack.packb({"images_BHWC": array, "prompts": ["a"], "metadata": []})


def _lying_lengths(draw: random.Random, large: int) -> tuple[str, bytes]:
    """A header that promises gigabytes, and nothing behind it."""
    marker, width = draw.choice(
        [(0xC6, "I"), (0xC9, "I"), (0xDB, "I"), (0xDD, "I"), (0xDF, "I"), (0xDC, "H"), (0xDE, "H")]
    )
    lie = struct.pack(
        f">B{width}", marker, draw.choice([2**16 - 1, 2**15]) if width == "H" else draw.choice([2**32 - 1, 2**30])
    )
    return draw.choice([SCORE_PATH, GRADIENT_PATH]), b"\x83\xabimages_BHWC" + lie * draw.randint(1, 40)


def _deep(draw: random.Random, large: int) -> tuple[str, bytes]:
    depth = draw.choice([17, 100, 600, 5000, 60_000])
    if draw.random() < 0.5:
        return PLAIN_SCORE_PATH, b'{"images": ' + b"[" * depth + b"]" * depth + b', "prompts": []}'
    return SCORE_PATH, b"\x81\xa8metadata" + draw.choice([b"\x91", b"\x81\xa1a"]) * depth + b"\x01"


def _many_small(draw: random.Random, large: int) -> tuple[str, bytes]:
    """Small on the wire, large as objects."""
    count = large // 4
    if draw.random() < 0.5:
        return PLAIN_SCORE_PATH, b'{"images": [' + b"[]," * count + b'[]], "prompts": []}'
    lists = b"\xdc\x40\x00" + b"\x90" * 0x4000
    return SCORE_PATH, b"\x81\xa8metadata\xdd" + struct.pack(">I", count // len(lists)) + lists * (count // len(lists))


def _wrong_fields(draw: random.Random, large: int) -> tuple[str, bytes]:
    value = draw.choice([None, 1, "x", [], {}, [[]], {"a": 1}, b"\x00", 1.5, "\x00" * 50])
    if draw.random() < 0.5:
        text = None if isinstance(value, bytes) else value
        field = draw.choice(["images", "prompts", "image_base64", "extra"])
        return PLAIN_SCORE_PATH, json.dumps({field: text, "prompt": text}).encode()
    field = draw.choice(["images_BHWC", "prompts", "metadata", "extra"])
    fields = {"images_BHWC": _array("uint8", [1, 2, 2, 3], bytes(12)), "prompts": ["a"], "metadata": []}
    # One value in its place that is never right there.
    wrong = 7 if field == "metadata" and value == [] else value
    return SCORE_PATH, msgpack.packb(fields | {field: wrong})


def _bomb(draw: random.Random, large: int) -> tuple[str, bytes]:
    """A PNG of kilobytes that decodes to gigabytes."""
    return PLAIN_SCORE_PATH, _plain(_picture_of(draw, draw.choice([20_000, 60_000, 2**31 - 1])))


def _text_bomb(draw: random.Random, large: int) -> tuple[str, bytes]:
    """A PNG whose text would inflate to gigabytes. No score reads texts, so the picture may be a valid one."""
    return PLAIN_SCORE_PATH, _plain(_picture_of(draw, 4, _chunk(b"zTXt", b"k\x00\x00" + _ZEROS)))


def _picture_of(draw: random.Random, side: int, *extra: bytes) -> bytes:
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), *extra]
    chunks += [_chunk(b"IDAT", _ZEROS[: draw.randint(100, len(_ZEROS))]), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _sliver(draw: random.Random, large: int) -> tuple[str, bytes]:
    """A line of pixels, which most models would enlarge to a square of its longer side; or just no line yet."""
    short = draw.choice([1, 1, 2, 3])
    size = [short, short * draw.choice([MAX_ASPECT, MAX_ASPECT + 1, 100, 1000])]
    draw.shuffle(size)
    image_HWC = np.zeros((*size, 3), np.uint8)
    if draw.random() < 0.5:
        return PLAIN_SCORE_PATH, _plain(_png(image_HWC))
    return SCORE_PATH, ScoreRequest(image_HWC[None], [PROMPT]).to_bytes()


def _long_text(draw: random.Random, large: int) -> tuple[str, bytes]:
    """A prompt, or a text in metadata, that would keep a tokenizer or a comparison busy."""
    text = draw.choice(["x", "“", "é ", '"', "<|endoftext|>"]) * draw.choice([200, 30_000, 200_000])
    prompt, metadata = draw.choice([(text, {}), (PROMPT, {"text": text}), (PROMPT, {"a": [{"b": text}]})])
    if draw.random() < 0.5:
        image = base64.b64encode(_png(IMAGES[0])).decode()
        return PLAIN_SCORE_PATH, json.dumps({"images": [image], "prompts": [prompt], "metadata": [metadata]}).encode()
    fields = {"images_BHWC": _array("uint8", [1, 2, 2, 3], bytes(12)), "prompts": [prompt], "metadata": [metadata]}
    return SCORE_PATH, msgpack.packb(fields)


def _wide(draw: random.Random, large: int) -> tuple[str, bytes]:
    """A map of far too many fields, at the top or below."""
    count = draw.choice([17, 1000, 65_535])
    many = msgpack.packb({f"{number:x}": 0 for number in range(count)})
    if draw.random() < 0.5:
        return SCORE_PATH, many
    return SCORE_PATH, b"\x82\xa8metadata\x91" + many + b"\xa7prompts" + msgpack.packb([many] * 4)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


_ZEROS = zlib.compress(bytes(2**24), 9)

KINDS: dict[str, Callable[[random.Random, int], tuple[str, bytes]]] = {
    "truncated": _truncated,
    "extended": _extended,
    "flipped": _flipped,
    "noise": _noise,
    "wrong dtype": _wrong_dtype,
    "huge shape": _huge_shape,
    "lying lengths": _lying_lengths,
    "wrong fields": _wrong_fields,
    "deep": _deep,
    "bomb": _bomb,
    "text bomb": _text_bomb,
    "sliver": _sliver,
    "long text": _long_text,
    "wide": _wide,
    "oversized": _oversized,
    "many small": _many_small,
}
# These take a hundred times as long as others.
SLOW = {"many small": 0.03, "oversized": 0.3, "long text": 0.3, "wide": 0.3}
# A changed pixel or letter is still a request; of slivers and long texts some are just none yet.
MAY_BE_VALID = ("flipped", "sliver", "long text", "text bomb")
