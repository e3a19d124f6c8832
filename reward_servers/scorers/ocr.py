"""OCR reward (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470, "visual text rendering"): legibility of the demanded text.

score = max(0, 1 - edits / length): Levenshtein distance between the text read in the image and the demanded text, over
the length of the demanded text, both without whitespace and in lower case; 1 when the demanded text is contained in the
text that was read (github.com/yifan123/flow_grpo, flow_grpo/ocr.py). The demanded text is metadata["text"], else the
first quoted part of the prompt.

Departures (`reward_servers/README.md` has the whole list): rapidocr (PP-OCR models as ONNX inside its package: nothing
is downloaded) replaces PaddleOCR; only the beginning of a page full of text is read; curly double quotes count as
quotes; a request that demands no text is rejected, where the published code raises; a failure of the OCR models fails
the request, where the published code scores 0. An image without legible text does score 0.
The models run on the CPU, whatever device the other scorers of the process use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import rapidocr
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR

from common.errors import ModelError, RewardRejected
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.wire import fingerprint, tensor_hashes
from reward_servers.scorers.base import Scorer

TEXT_KEY = "text"
QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”')
"""A second opening curly quote starts a new quote, so a prompt of nothing but opening quotes is scanned only once."""
MAX_TEXT_CHARACTERS = 1024
"""A longer demanded text is refused: comparing costs its length times the length of the text that is read.

This is far more text than an image can hold that a generator can write.
"""
LONG_SIDE = 960
"""Images with a longer side than this are shrunk to it for the text detector; smaller ones are not enlarged.

This is PaddleOCR's default, with which the published reward reads. rapidocr's own default enlarges the shorter side to
736 pixels.
"""
LINE_HEIGHT = 48
"""Lines of text are scaled to this many pixels before they are read."""
MIN_LINE_WIDTH = 320
"""A shorter line is padded to this many pixels."""
MAX_LINES_WIDTH = MAX_TEXT_CHARACTERS * LINE_HEIGHT
"""The lines that are read together have at most this width, once scaled: the longest text that may be demanded, in
square letters.

Reading costs 0.1 s of one core per 1000 pixels of width, and twice as much in a single line of this width. Without this
limit a page of small print costs a minute.
"""
MODELS = Path(rapidocr.__file__).parent / "models"
CHECK_WORDS = "Ready 42"
"""These words are read once at start: both models are loaded and known to work before the server is ready."""


class BoundedReader(RapidOCR):  # type: ignore[misc]  # rapidocr is not type-checked
    """rapidocr, which reads the lines that it has found in an image only up to MAX_LINES_WIDTH."""

    def crop_text_regions(self, img: ByteArray, det_boxes: FloatArray) -> list[ByteArray]:
        return first_lines(super().crop_text_regions(img, det_boxes))


class OcrScorer(Scorer):
    """score = 1 - normalised edit distance of the demanded text, in [0, 1]."""

    name = "ocr"
    score_range = (0.0, 1.0)
    preprocess_version = f"rapidocr-3.10.0-max{LONG_SIDE}-lines{MAX_LINES_WIDTH}-4"
    check_prompt = 'a sign that says "probe"'

    def __init__(self, detector: Path, recogniser: Path, threads: int) -> None:
        models = {path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in (detector, recogniser)}
        self.weights_hash = fingerprint(tensor_hashes(models))
        self._reader = BoundedReader(
            params={
                "Global.log_level": "critical",
                # As published: text that is upside down is not rotated.
                "Global.use_cls": False,
                "Det.model_path": str(detector),
                "Det.limit_type": "max",
                "Det.limit_side_len": LONG_SIDE,
                "Rec.model_path": str(recogniser),
                # A batch pads its lines to the longest, which costs more than it saves on a CPU.
                "Rec.rec_batch_num": 1,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:  # noqa: ARG003
        if model_dir is not None:
            raise ModelError(f"the ocr scorer brings its own models: leave out the model directory {model_dir}")
        # onnxruntime does not read the variable with which the server sets the other libraries' threads.
        scorer = cls(_bundled("det"), _bundled("rec"), threads=int(os.environ.get("OMP_NUM_THREADS", "1")))
        read = scorer.read(_render(CHECK_WORDS))
        if normalise(read) != normalise(CHECK_WORDS):
            raise ModelError(f"the models in {MODELS} read {read!r} where {CHECK_WORDS!r} stands: reinstall rapidocr")
        return scorer

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
        demanded = [demanded_text(prompt, item) for prompt, item in zip(prompts, metadata, strict=True)]
        scores = [similarity(self.read(image), text) for image, text in zip(images_BHWC, demanded, strict=True)]
        return np.array(scores, dtype=np.float32)

    def read(self, image_HWC: ByteArray) -> str:
        """The text of an RGB uint8 image, its lines joined in reading order; empty when none is legible."""
        lines = self._reader(np.ascontiguousarray(image_HWC[..., ::-1])).txts
        return "".join(lines or ())


def first_lines(lines_HWC: Sequence[ByteArray]) -> list[ByteArray]:
    """The first lines, in reading order, whose widths add up to at most MAX_LINES_WIDTH; a longer first one is cut."""
    widths = [max(MIN_LINE_WIDTH, LINE_HEIGHT * line.shape[1] // line.shape[0]) for line in lines_HWC]
    count = int(np.searchsorted(np.cumsum(widths), MAX_LINES_WIDTH, side="right"))
    if count == 0 and len(lines_HWC):
        return [lines_HWC[0][:, : MAX_LINES_WIDTH * lines_HWC[0].shape[0] // LINE_HEIGHT]]
    return list(lines_HWC[:count])


def demanded_text(prompt: str, metadata: Metadata) -> str:
    """metadata["text"], else the first quoted part of the prompt; RewardRejected when neither contains text."""
    text = metadata.get(TEXT_KEY)
    if text is None:
        quoted = QUOTED.search(prompt)
        text = next((part for part in quoted.groups() if part is not None), "") if quoted else ""
    if not isinstance(text, str) or not normalise(text):
        raise RewardRejected(
            OcrScorer.name,
            "request",
            f"the prompt {prompt[:80]!r} demands no text: put it in double quotes, or as a string in "
            f'metadata["{TEXT_KEY}"]',
        )
    if len(text) > MAX_TEXT_CHARACTERS:
        message = (
            f"the demanded text {text[:40]!r}... has {len(text)} characters, at most {MAX_TEXT_CHARACTERS} are read"
        )
        raise RewardRejected(OcrScorer.name, "request", f"{message}: demand less")
    return text


def similarity(read: str, demanded: str) -> float:
    """1 - edits / length of the demanded text, at least 0; 1 when the text that was read contains it."""
    read, demanded = normalise(read), normalise(demanded)
    if demanded in read:
        return 1.0
    return 1.0 - min(edit_distance(read, demanded), len(demanded)) / len(demanded)


def normalise(text: str) -> str:
    """The text without whitespace, in lower case."""
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions from one to the other (Levenshtein 1966), row by row."""
    letters = np.array([ord(letter) for letter in second], dtype=np.int64)
    steps = np.arange(len(second) + 1)
    row = steps
    for index, letter in enumerate(first, start=1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        # An insertion costs 1 from its left neighbour: the smallest of (value - column), carried to the right.
        row = np.minimum.accumulate(np.concatenate([[index], changed]) - steps) + steps
    return int(row[-1])


def _bundled(kind: str) -> Path:
    found = sorted(MODELS.glob(f"*_{kind}_*.onnx"))
    if len(found) != 1:
        raise ModelError(f"{MODELS} holds {len(found)} {kind} models where one is due: reinstall rapidocr")
    return found[0]


def _render(words: str) -> ByteArray:
    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((24, 20), words, fill="black", font=ImageFont.load_default(48))
    return np.asarray(image)
