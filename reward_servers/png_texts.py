"""Drops what a PNG has beside its pixels: texts and a colour profile.

Programs that draw pictures write their settings and whole workflows there. Pillow inflates all of it with the header,
and refuses a file with more than its limits. No score depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

SIGNATURE, LAST = b"\x89PNG\r\n\x1a\n", b"IEND"
DROPPED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Kinds of chunks that are dropped (PNG, third edition, 11.3)."""
ORIENTING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts that begin so are kept: Pillow reads the orientation of a picture from them."""
LENGTH_BYTES, HEAD_BYTES, FRAME_BYTES = 4, 8, 12
"""A chunk is its length, its kind, its content and a checksum of 4 bytes."""


def without_texts(content: bytes, check: Callable[[], None]) -> bytes:
    """The file without those chunks; any other file, and the rest of a broken one, as it is.

    `check` is called before each chunk, and may raise to end the work.
    """
    if not content.startswith(SIGNATURE):
        return content
    kept, begin, position = [], 0, len(SIGNATURE)
    while position + FRAME_BYTES <= len(content):
        check()
        end = position + FRAME_BYTES + int.from_bytes(content[position : position + LENGTH_BYTES])
        kind = content[position + LENGTH_BYTES : position + HEAD_BYTES]
        if end > len(content) or kind == LAST:
            break
        if kind in DROPPED and not content.startswith(ORIENTING, position + HEAD_BYTES):
            kept.append(content[begin:position])
            begin = end
        position = end
    return b"".join([*kept, content[begin:]]) if kept else content
