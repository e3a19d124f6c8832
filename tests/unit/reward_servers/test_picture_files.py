"""Picture files as cameras and editors write them: the right pixels through every door, or a reason in one line."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from common.errors import RewardInvalid, RewardRejected, RewardUnavailable
from common.rewards.api import ByteArray, ScoreRequest, ScoreResponse
from reward_servers import plain_json, score_images
from reward_servers.picture_files import MAX_OWN_PIXELS, MAX_PASSES, OWN_FORMATS, SENT_FORMATS, open_picture, pixels_HWC
from reward_servers.picture_request import PictureRequest
from tests.helpers.fake_reward_server import fake_server
from tests.helpers.serving_app import LIMITS

RGB = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0]], [[255, 255, 255], [10, 20, 30], [128, 128, 128]]], np.uint8)
GREY = np.array([[0, 1, 127], [128, 254, 255]], np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def of(pixels: np.ndarray[Any, Any], mode: str | None = None) -> Image.Image:
    image = Image.fromarray(pixels)
    return image if mode is None else image.convert(mode)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand; each row begins with the byte of its filter, 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def big(kind: str, **options: Any) -> bytes:
    return file(of(np.tile(RGB, (8, 8, 1))), kind, **options)


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def posted(content: bytes) -> ByteArray:
    """The pixels that a scorer gets if the file is sent to POST /score."""
    body = json.dumps({"image_base64": base64.b64encode(content).decode(), "prompt": "a"}).encode()
    pixels: ByteArray = plain_json.parse(bytearray(body), LIMITS, "hps").decode().images_BHWC[0]
    return pixels


def commanded(content: bytes, folder: Path) -> ByteArray:
    """The pixels that a scorer gets if the file is named to the command `score`."""
    path, asked = folder / "picture", []
    path.write_bytes(content)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(ScoreRequest.from_bytes(request.content))
        return httpx.Response(200, content=ScoreResponse("x", "", np.zeros(1, np.float32)).to_bytes())

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        score_images.score(http, "http://server", path, "a", {})
    pixels: ByteArray = asked[0].images_BHWC[0]
    return pixels


def test_a_page_of_a_proxy_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(file(of(RGB)))
    page = httpx.Response(301, headers={"location": "https://there/v1/score"}, html="<html>\n<h1>301 Moved</h1>")
    with (
        httpx.Client(transport=httpx.MockTransport(lambda _: page)) as http,
        pytest.raises(
            RewardRejected,
            match=r"answered 301: 301 Moved: it redirects to https://there/v1/score: give the server's URL there$",
        ),
    ):
        score_images.score(http, "http://server", path, "a", {})


def test_a_page_of_another_program_is_no_score(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(file(of(RGB)))
    page = httpx.Response(200, html="<html>\n<h1>It works!</h1>")
    with (
        httpx.Client(transport=httpx.MockTransport(lambda _: page)) as http,
        pytest.raises(RewardInvalid) as caught,
    ):
        score_images.score(http, "http://server", path, "a", {})
    begin = f"{path}: http://server/v1/score answered 'It works!', which is no score ("
    assert str(caught.value).startswith(begin)
    assert str(caught.value).endswith("): give the --url of a reward server")


CUTOUT = np.dstack([RGB, np.array([[0, 255, 0], [128, 0, 255]], np.uint8)])
RIGHT: dict[str, tuple[bytes, ByteArray]] = {
    "RGB": (file(of(RGB)), RGB),
    # The colour under transparent pixels counts, as in the published recipes.
    "RGBA": (file(of(CUTOUT)), RGB),
    "RGB with a transparent colour": (file(of(RGB), transparency=(255, 0, 0)), RGB),
    "L": (file(of(GREY)), GREY_RGB),
    "LA": (file(of(np.dstack([GREY, GREY[::-1]]))), GREY_RGB),
    "L with a transparent grey": (file(of(GREY), transparency=127), GREY_RGB),
    "P": (file(of(RGB).quantize(8)), RGB),
    "P with transparent entries": (file(of(RGB).quantize(8), transparency=bytes([0, 128, 255])), RGB),
    "1": (file(of(GREY).point(lambda grey: 255 * (grey > 127)).convert("1")), np.where(GREY_RGB > 127, 255, 0)),
    "2 bits": (png(4, 1, 2, 0, b"\0\x1b"), np.repeat(np.array([[[0], [85], [170], [255]]]), 3, axis=2)),
    "4 bits": (png(2, 1, 4, 0, b"\0\x0f"), np.array([[[0] * 3, [255] * 3]])),
    "grey of 16 bits": (file(of(GREY.astype(np.uint16) * 257)), GREY_RGB),
    # The upper byte counts: 0x80ff is 0x80 of 8 bits.
    "grey of 16 bits, odd": (file(of(GREY.astype(np.uint16) * 256 + 255)), GREY_RGB),
    "grey and transparency of 16 bits": (png(1, 1, 16, 4, b"\0\x80\x01\0\0"), np.full((1, 1, 3), 128)),
    "colour of 16 bits": (png(1, 1, 16, 2, b"\0\xff\xff\x80\x00\x00\x01"), np.array([[[255, 128, 0]]])),
    "what follows the file does not count": (file(of(RGB)) + b"\0" * 64, RGB),
}
PHOTO = np.zeros((16, 32, 3), np.uint8)
PHOTO[:, 16:] = 255
"""Black on the left, white on the right: JPEG keeps it exactly."""


@pytest.mark.parametrize("kind", RIGHT)
def test_every_mode_is_converted_rightly_through_every_door(kind: str, tmp_path: Path) -> None:
    content, expected = RIGHT[kind]
    np.testing.assert_array_equal(posted(content), expected)
    np.testing.assert_array_equal(commanded(content, tmp_path), expected)


@pytest.mark.parametrize(
    "content",
    [
        file(of(RGB), "TIFF"),
        file(of(RGB), "BMP"),
        file(of(RGB), "WEBP", lossless=True),
        file(of(RGB).quantize(8), "GIF"),
        file(of(RGB, "CMYK"), "TIFF"),
        file(of(CUTOUT), "TIFF"),
    ],
)
def test_the_command_reads_what_editors_write(content: bytes, tmp_path: Path) -> None:
    np.testing.assert_array_equal(commanded(content, tmp_path), RGB)
    with pytest.raises(RewardRejected, match="an image is no PNG/JPEG, or its header is broken: send a PNG"):
        posted(content)


def test_a_tiff_of_signed_numbers_is_refused() -> None:
    """Pillow reads -1 as white."""
    signed = io.BytesIO()
    of(GREY).save(signed, "TIFF", tiffinfo={339: 2})
    with pytest.raises(RewardRejected, match="signed numbers"):
        open_picture(signed.getvalue(), OWN_FORMATS, MAX_OWN_PIXELS)


def test_a_16_bit_tiff_equals_its_8_bits(tmp_path: Path) -> None:
    content = file(of(GREY.astype(np.uint16) * 257), "TIFF")
    np.testing.assert_array_equal(commanded(content, tmp_path), GREY_RGB)
    # The same file, but its zero is white; then its samples have 12 bits.
    bits, zero = struct.pack("<HHIH", 258, 3, 1, 16), struct.pack("<HHIH", 262, 3, 1, 1)
    assert (content.count(bits), content.count(zero)) == (1, 1)
    for wrong in (content.replace(zero, zero[:8] + b"\0\0"), content.replace(bits, bits[:8] + b"\x0c\0")):
        with pytest.raises(RewardRejected, match=r"send grey of 8 or 16 bits whose zero is black|cannot be"):
            commanded(wrong, tmp_path)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, PHOTO),
        (2, PHOTO[:, ::-1]),
        (3, PHOTO[::-1, ::-1]),
        (4, PHOTO[::-1]),
        (5, PHOTO.transpose(1, 0, 2)),
        # 6: the camera was turned, and the row at the left of the scene is stored first: turn clockwise.
        (6, np.rot90(PHOTO, -1)),
        (7, np.rot90(PHOTO, -1)[:, ::-1][::-1, ::-1]),
        (8, np.rot90(PHOTO)),
        (99, PHOTO),
    ],
)
def test_a_photo_is_turned_as_its_exif_data_says(orientation: int, expected: ByteArray, tmp_path: Path) -> None:
    for content in (
        file(of(PHOTO), "JPEG", exif=tagged(orientation), quality=100),
        file(of(PHOTO), "PNG", exif=tagged(orientation)),
    ):
        np.testing.assert_array_equal(posted(content), expected)
        np.testing.assert_array_equal(commanded(content, tmp_path), expected)
    corner = PHOTO.copy()
    corner[0, 0] = (255, 0, 0)
    turned = posted(file(of(corner), "PNG", exif=tagged(orientation)))
    # Where the first pixel of the file belongs (EXIF 2.32, tag 0x0112: the sides of row 0 and column 0).
    side = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}.get(orientation, (0, 0))
    assert turned[side].tolist() == [255, 0, 0]


def test_broken_exif_data_says_nothing() -> None:
    content = file(of(PHOTO), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0", quality=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(posted(content), PHOTO)


def test_photos_of_one_request_have_one_size_when_upright() -> None:
    def request(*files: bytes) -> PictureRequest:
        encoded = [base64.b64encode(one).decode() for one in files]
        return plain_json.parse(
            bytearray(json.dumps({"images": encoded, "prompts": ["a"] * 2}).encode()), LIMITS, "hps"
        )

    lying, standing = of(PHOTO), of(np.rot90(PHOTO, -1).copy())
    both = request(file(lying, exif=tagged(6)), file(standing)).decode().images_BHWC
    np.testing.assert_array_equal(both[0], both[1])
    with pytest.raises(RewardRejected, match="images of 2 sizes in one request"):
        request(file(lying, exif=tagged(6)), file(lying)).decode()


def test_the_further_pictures_of_a_cameras_file_do_not_count(tmp_path: Path) -> None:
    content = file(of(PHOTO), "MPO", save_all=True, append_images=[of(PHOTO[::-1])], quality=100)
    np.testing.assert_array_equal(posted(content), PHOTO)
    np.testing.assert_array_equal(commanded(content, tmp_path), PHOTO)


def test_a_jpeg_of_ink_or_grey_is_converted() -> None:
    np.testing.assert_array_equal(posted(file(of(PHOTO, "CMYK"), "JPEG", quality=100)), PHOTO)
    np.testing.assert_array_equal(posted(file(of(PHOTO, "L"), "JPEG", quality=100)), PHOTO)
    np.testing.assert_array_equal(posted(file(of(PHOTO, "YCbCr"), "JPEG", quality=100)), PHOTO)


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an image is empty: it has 0 bytes"),
    "text": (b"hello", "or its header is broken"),
    "two frames": (file(of(RGB), save_all=True, append_images=[of(RGB[::-1])]), "an image has several frames"),
    "no pixels": (png(0, 0, 8, 2, b""), "or its header is broken"),
    "no width": (png(0, 4, 8, 2, b"\0" * 4), "or its header is broken"),
    "huge": (png(2**20, 2**20, 8, 0, b"\0"), "an image is too large: "),
    "large": (png(8193, 8193, 8, 0, b"\0"), "exceeds the limit of"),
    "sliver": (png(33, 1, 8, 0, b"\0" * 34), "is a sliver: its sides differ by more than 32, crop it"),
    "cut PNG": (big("PNG")[:-40], "an image cannot be decoded: "),
    "cut JPEG": (big("JPEG")[:-2], "an image cannot be decoded: image file is truncated"),
    "half a JPEG": (big("JPEG")[:300], "an image cannot be read: "),
    "damaged PNG": (big("PNG").replace(b"IDAT", b"IDAT\xff", 1), "an image cannot be decoded: "),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "or its header is broken"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "or its header is broken"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "or its header is broken"),
}
WRONG_ALONE: dict[str, tuple[bytes, str]] = {
    "I": (file(of(GREY.astype(np.int32)), "TIFF"), "an image has mode I, whose white is not known: send 8 bits"),
    "F": (file(of(GREY.astype(np.float32)), "TIFF"), "an image has mode F, whose white is not known: send 8 bits"),
    "LAB": (file(of(RGB, "LAB"), "TIFF"), "an image has mode LAB"),
    "GIF": (file(of(RGB), "GIF", save_all=True, append_images=[of(RGB[::-1])]), "an image has several frames"),
    "WebP": (file(of(RGB), "WEBP", save_all=True, append_images=[of(RGB[::-1])]), "an image has several frames"),
    "TIFF": (file(of(RGB), "TIFF", save_all=True, append_images=[of(RGB)]), "an image has several frames"),
    "cut WebP": (big("WEBP", lossless=True)[:-20], "an image cannot be "),
    "cut TIFF": (big("TIFF")[:-100], "an image cannot be "),
}


@pytest.mark.parametrize("kind", [*WRONG, *WRONG_ALONE])
def test_what_is_no_picture_is_refused_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = (WRONG | WRONG_ALONE)[kind]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert score_images.main(["--url", "http://127.0.0.1:1", str(path), "--prompt", "a"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"rtdmd score: {path}: an image ")
    assert expected in errors[0]
    if kind in WRONG:
        with pytest.raises(RewardRejected) as caught:
            posted(content)
        assert expected in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


LOSSLESS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")


def black_and_white(mode: str) -> Image.Image:
    values = GREY // 128 * 255
    if mode in ("I", "F"):
        return of(values.astype(np.int32 if mode == "I" else np.float32))
    colour = of(np.repeat(values[..., None], 3, axis=2))
    return (colour.convert("RGBA") if mode == "PA" else colour).convert(mode)


@pytest.mark.parametrize("kind", OWN_FORMATS)
def test_no_file_that_pillow_writes_is_read_wrongly(kind: str) -> None:
    """Black is read as black and white as white, or the file is refused."""
    refused = set()
    for mode in MODES:
        try:
            content = file(black_and_white(mode), kind, **LOSSLESS.get(kind, {}))
        except (OSError, ValueError):  # the format has no such mode
            continue
        try:
            found = pixels_HWC(open_picture(content, OWN_FORMATS, 64))
        except RewardRejected as error:
            refused.add((mode, "whose white is not known" in str(error)))
            continue
        # Writing LAB as WebP loses a level.
        np.testing.assert_allclose(found, np.where(GREY_RGB > 127, 255.0, 0.0), atol=1)
    assert refused == ({("I", True), ("F", True), ("LAB", True)} if kind == "TIFF" else set())


def test_no_cut_file_gives_other_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for content in (
        file(of(pixels)),
        file(of(pixels), "JPEG"),
        file(of(pixels), "JPEG", progressive=True),
        file(of(pixels[..., 0].astype(np.uint16) * 257)),
    ):
        whole = pixels_HWC(open_picture(content, SENT_FORMATS, 144))
        for length in range(len(content)):
            try:
                found = pixels_HWC(open_picture(content[:length], SENT_FORMATS, 144))
            except RewardRejected:
                continue
            np.testing.assert_array_equal(found, whole)


def test_the_passes_of_a_jpeg_are_bounded() -> None:
    content = file(of(PHOTO), "JPEG", progressive=True, quality=100)
    last = content.rindex(b"\xff\xda")
    scan = content[last:-2]
    few, many = (content[:-2] + scan * count + b"\xff\xd9" for count in (20, MAX_PASSES))
    np.testing.assert_array_equal(posted(few), PHOTO)
    with pytest.raises(RewardRejected, match="a JPEG of more than 100 passes: save it anew, not progressive"):
        posted(many)
    # A film behind a photo may hold any bytes.
    np.testing.assert_array_equal(posted(content + b"\xff\xda" * 500), PHOTO)


@pytest.mark.parametrize(
    "between",
    [
        b"\xff\x01",  # TEM has no length: what follows it is no length either
        b"\xff\x02",  # reserved, as the decoder skips it where it waits for a restart marker
        b"\xff\xbf",
        b"\xff\xd0",
        b"\xff\xff\xff",
        b"\xff\x00",
        b"of no segment",
        b"\xff\xfe\x00\x02",  # a comment without text
        b"\xff\xfe\x00\x00",  # the decoder reads on behind a length that is too short
    ],
)
def test_what_stands_between_the_passes_hides_none(between: bytes) -> None:
    content = file(of(PHOTO), "JPEG", progressive=True, quality=100)
    header = content[content.rindex(b"\xff\xda") :][:10]
    with pytest.raises(RewardRejected, match="a JPEG of more than 100 passes"):
        posted(content[:-2] + between + header * MAX_PASSES + b"\0" * 8 + b"\xff\xd9")


@pytest.mark.parametrize("between", [b"\xff\x01", b"\xff\xd0", b"\xff\xff\xff", b"\xff\xfe\x00\x04\xff\xda"])
def test_what_stands_between_the_passes_does_not_count(between: bytes) -> None:
    content = file(of(PHOTO), "JPEG", progressive=True, quality=100)
    np.testing.assert_array_equal(posted(content[:-2] + between * MAX_PASSES + b"\xff\xd9"), PHOTO)


def test_other_files_are_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "absent.png", "No such file or directory")):
        assert score_images.main(["--url", "http://127.0.0.1:1", str(path), "--prompt", "a"]) == 2
        assert capsys.readouterr().err == f"rtdmd score: {path} cannot be read: {reason}\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--prompt", "caf\udce9"), "the text 'caf\\udce9' has half of a surrogate pair"),
        (("--prompt", "a", "--metadata", r'{"tag": "\ud83c"}'), r"the text '\ud83c' has half of a surrogate pair"),
        (("--prompt", "a", "--metadata", '{"share": NaN}'), "NaN is no number of JSON"),
        (("--prompt", "a", "--metadata", "[" * 100_000), "nested too deeply"),
    ],
)
def test_the_commands_texts_are_checked(
    options: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file(of(RGB)))
    try:
        status = score_images.main(["--url", "http://127.0.0.1:1", str(path), *options])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_decoder_can_be_ended_between_two_blocks_of_a_file(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    content, calls = file(of(noise), kind), []

    def check() -> None:
        calls.append(1)
        if len(calls) > allowed[0]:
            raise RewardUnavailable("any", "deadline", "late")

    allowed = [10_000]
    pixels_HWC(open_picture(content, SENT_FORMATS, 2**20, check))
    needed = len(calls)
    assert needed > len(content) / 2**13
    for count in (0, needed // 2, needed - 1):
        calls.clear()
        allowed[0] = count
        with pytest.raises(RewardUnavailable, match="late"):
            pixels_HWC(open_picture(content, SENT_FORMATS, 2**20, check))


def texts(*pairs: tuple[str, str], **options: Any) -> bytes:
    """A PNG of RGB with texts before its pixels."""
    info = PngImagePlugin.PngInfo()
    for name, text in pairs:
        info.add_itxt(name, text, **options)
    return file(of(RGB), pnginfo=info)


def with_late_text(content: bytes) -> bytes:
    """The PNG with a text after its pixels."""
    return content[:-12] + chunk(b"tEXt", b"prompt\0" + b"x" * 2**21) + content[-12:]


WORKFLOW = "x" * 2**21
TEXTS = {
    "one": texts(("workflow", WORKFLOW)),
    "many": texts(*[(f"text{number}", "x" * 200_000) for number in range(9)]),
    "inflating": texts(("workflow", WORKFLOW), zip=True),
    "late": with_late_text(file(of(RGB))),
    "Latin-1": file(of(RGB)).replace(b"IDAT", b"IDAT", 1)[:33]
    + chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 2**21))
    + file(of(RGB))[33:],
    "profile": file(of(RGB))[:33] + chunk(b"iCCP", b"p3\0\0" + zlib.compress(b"x" * 2**21)) + file(of(RGB))[33:],
    "damaged text": file(of(RGB))[:33] + chunk(b"tEXt", b"prompt\0a")[:-1] + b"\xaa" + file(of(RGB))[33:],
}


@pytest.mark.parametrize("kind", TEXTS)
def test_the_texts_of_a_png_do_not_count(kind: str, tmp_path: Path) -> None:
    """Programs that draw pictures save a whole workflow in them, some of more than the megabyte that Pillow reads."""
    for found in (commanded(TEXTS[kind], tmp_path), posted(TEXTS[kind])):
        np.testing.assert_array_equal(found, RGB)


@pytest.mark.parametrize("name", ["XML:com.adobe.xmp", "Raw profile type exif"])
def test_a_text_with_the_orientation_is_kept(name: str) -> None:
    exif = b"Exif\0\0" + tagged(3).tobytes().removeprefix(b"Exif\0\0")
    written = f"\nexif\n{len(exif)}\n{exif.hex()}\n" if name.startswith("Raw") else '<a tiff:Orientation="3"/>'
    np.testing.assert_array_equal(posted(texts(("workflow", WORKFLOW), (name, written))), RGB[::-1, ::-1])


def test_a_text_with_the_orientation_that_inflates_is_refused_before_it_does() -> None:
    """A few kB of a file can be megabytes of text."""
    content = texts(*[("XML:com.adobe.xmp", "0" * (2**20 - 1))] * 3, zip=True)
    with pytest.raises(RewardRejected, match=r"an image cannot be read: Too much memory used in .*: save it anew"):
        open_picture(content, ("PNG",), 2**20)


def test_a_png_of_many_texts_can_be_ended() -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 100:
            raise RewardUnavailable("any", "deadline", "late")

    content = file(of(RGB))
    many = content[:33] + chunk(b"tEXt", b"a\0") * 1000 + content[33:]
    with pytest.raises(RewardUnavailable, match="late"):
        open_picture(many, SENT_FORMATS, 2**20, check)
    assert len(calls) == 101


def test_all_files_are_checked_before_the_first_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy from a Mac has a companion beside each picture. Nothing listens at the address; a request would fail."""
    picture, companion = tmp_path / "a.png", tmp_path / "._a.png"
    picture.write_bytes(file(of(RGB)))
    companion.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    command = ["--url", "http://127.0.0.1:1", str(picture), str(companion), "--prompt", "a"]
    assert score_images.main(command) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.startswith(f"rtdmd score: {companion}: an image is no ")) == ("", True)


def test_a_pipe_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    with fake_server() as server:
        os.write(writer, file(of(RGB)))
        os.close(writer)
        try:
            assert score_images.main(["--url", server.url, f"/dev/fd/{reader}", "--prompt", "a"]) == 0
        finally:
            os.close(reader)
    assert capsys.readouterr().out.endswith(f"  /dev/fd/{reader}\n")
    assert len(server.bodies) == 1
