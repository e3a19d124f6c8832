"""Reader of picture files, the one for every door: `POST /score` and `rtdmd score`.

A file becomes RGB pixels of 8 bits as the published recipes read it (`Image.open(file).convert("RGB")`), with two
differences: 16-bit grey is scaled, where Pillow clips it to white, and a photo is turned as its EXIF orientation says.
What has no certain RGB value is refused:

- Transparency is dropped. The colour under transparent pixels counts, as in the published recipes.
- The texts of a PNG do not count, however many they are.
- Colour profiles, gamma and CMYK's inks are not managed: the numbers in the file are taken for sRGB.
- Grey of 32 bits and of floating point has no known white, LAB no certain meaning: refused.
- Several frames are several pictures: refused. A JPEG's further pictures (depth, preview) do not count.

A file may be small and its pixels many, or its passes: both are known before anything is decoded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from common.errors import RewardRejected, RewardUnavailable
from common.rewards.api import ANY_REWARD, ByteArray, check_pixels
from reward_servers.png_texts import without_texts

SENT_FORMATS = ("PNG", "JPEG")
"""Formats that a server reads. WebP's decoder allocates memory for the declared size before that can be refused."""
OWN_FORMATS = (*SENT_FORMATS, "WEBP", "TIFF", "BMP", "GIF")
"""Formats that a person's own command reads."""
MAX_OWN_PIXELS = 2**26
"""A person's own picture may have this many pixels; the server has a limit of its own."""
COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""These modes have 8 bits per channel or fewer, and Pillow converts them to RGB without loss of range."""
GREY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
BLOCK_BYTES = 2**12
"""A decoder is given so many bytes at once; between two blocks it can be ended."""
MAX_PASSES = 100
"""A progressive JPEG is decoded in at most this many passes over all its pixels; encoders write about ten."""
JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""A segment of a JPEG begins so. The markers from 00 to BF and from D0 to D8 have no length, and the decoder reads on
behind them (ITU-T T.81, B.1.1; libjpeg's next_marker and jpeg_resync_to_restart)."""
START_OF_PASS, END_OF_IMAGE = 0xDA, 0xD9
ORIENTATION_TAG, BITS_TAG, PHOTOMETRIC_TAG = 0x0112, 258, 262
SAMPLE_FORMAT_TAG, UNSIGNED = 339, 1
BLACK_IS_ZERO = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how to turn the picture upright (EXIF 2.32, tag 0x0112)."""


# Pillow inflates a PNG's texts when it reads the header, by default up to 64 MiB of them. Only those that may have an
# orientation are left by then, see `without_texts`.
PngImagePlugin.MAX_TEXT_MEMORY = 2**20
Check = Callable[[], None]
"""Called between the steps of reading a file; it raises RewardUnavailable to end the work."""


def unhurried() -> None:
    """The check of a person's own command, which has all the time it needs."""


class _CheckedFile(io.BytesIO):
    """A file in memory that calls a check before each read; a decoder reads BLOCK_BYTES at once."""

    def __init__(self, content: bytes, check: Check) -> None:
        super().__init__(content)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


def open_picture(content: bytes, formats: tuple[str, ...], max_pixels: int, check: Check = unhurried) -> Image.Image:
    """Read a file's header; RewardRejected unless it is one picture that can be decoded in bounded work and memory.

    `check` may end this and the decoding, at every block of the file, by raising RewardUnavailable.
    """
    if not content:
        _reject("an image is empty: it has 0 bytes")
    content = without_texts(content, check)
    try:
        image = Image.open(_CheckedFile(content, check), formats=formats)
        check_pixels(image.height, image.width, max_pixels)
        several = _has_more_frames(image)
    except (RewardRejected, RewardUnavailable):
        raise
    except Image.DecompressionBombError as error:
        raise RewardRejected(
            ANY_REWARD, "too_large", f"an image is too large: {_first_line(error)}: shrink it"
        ) from error
    except UnidentifiedImageError as error:
        message = f"an image is no {'/'.join(formats)}, or its header is broken"
        raise RewardRejected(ANY_REWARD, "request", f"{message}: send a {formats[0]}") from error
    except Exception as error:  # a decoder may raise anything for a malicious file
        raise RewardRejected(
            ANY_REWARD, "request", f"an image cannot be read: {_first_line(error)}: save it anew"
        ) from error
    if several:
        _reject("an image has several frames: send the one to score as a picture of its own")
    if image.mode not in COLOUR_MODES + GREY16_MODES:
        _reject(f"an image has mode {image.mode}, whose white is not known: send 8 bits a channel, or grey of 16 bits")
    if image.format == "TIFF" and {*image.tag_v2.get(SAMPLE_FORMAT_TAG, (UNSIGNED,))} != {UNSIGNED}:  # type: ignore[attr-defined]
        _reject("an image is a TIFF of signed numbers: send unsigned ones")
    if image.mode in GREY16_MODES and image.format == "TIFF":
        _check_grey16_tiff(image)
    if image.format in ("JPEG", "MPO") and _passes(content) > MAX_PASSES:
        _reject(f"an image is a JPEG of more than {MAX_PASSES} passes: save it anew, not progressive")
    return image


def pixels_HWC(image: Image.Image) -> ByteArray:
    """Decode an opened picture to uint8 [H, W, 3]; RewardRejected for a broken file."""
    try:
        if isinstance(image, ImageFile.ImageFile):
            image.decodermaxblock = BLOCK_BYTES
        image.load()
        # Pillow would translate it, for some files with a warning; it is dropped anyway.
        image.info.pop("transparency", None)
        turn = _orientation(image)
        return _rgb_HWC(image.transpose(TURNS[turn]) if turn in TURNS else image)
    except RewardUnavailable:
        raise
    except Exception as error:  # see open_picture
        raise RewardRejected(
            ANY_REWARD, "request", f"an image cannot be decoded: {_first_line(error)}: save it anew"
        ) from error


def _rgb_HWC(image: Image.Image) -> ByteArray:
    if image.mode in GREY16_MODES:
        # The upper byte, as Pillow itself reads colour of 16 bits.
        grey_HW = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation, 1 to 8; None without one. As in viewers, EXIF data that is broken says nothing."""
    try:
        return image.getexif().get(ORIENTATION_TAG)
    except Exception:
        return None


def _has_more_frames(image: Image.Image) -> bool:
    """Whether it is several pictures; a camera's JPEG (MPO) may hold depth and previews of one picture too."""
    try:
        if image.format != "MPO":
            image.seek(1)
    except EOFError:
        return False
    return image.format != "MPO"


def _passes(content: bytes) -> int:
    """Passes over the pixels of a JPEG, counted up to one more than MAX_PASSES; what follows its end does not count."""
    position, passes = len(b"\xff\xd8"), 0
    while passes <= MAX_PASSES and (marker := JPEG_MARKER.search(content, position)):
        kind, begin = marker[0][1], marker.end()
        if kind == END_OF_IMAGE:
            break
        passes += kind == START_OF_PASS
        position = begin + int.from_bytes(content[begin : begin + 2])
    return passes


def _check_grey16_tiff(image: Any) -> None:
    """Pillow reads 12 bits, and grey whose zero is white, into the same mode."""
    bits, photometric = image.tag_v2.get(BITS_TAG), image.tag_v2.get(PHOTOMETRIC_TAG)
    if bits != (16,) or photometric != BLACK_IS_ZERO:
        _reject(
            f"an image is a TIFF of {bits} bits and photometric interpretation {photometric}: send grey of 8 or 16 "
            "bits whose zero is black"
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _reject(message: str) -> NoReturn:
    raise RewardRejected(ANY_REWARD, "request", message)
