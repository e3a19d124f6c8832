"""Processor seconds that the OCR reward spends on one picture, by its size and by how much text is in it.

    python -m benchmarks.ocr_reading

One thread, processor time rather than wall time, best of three. Needs `pip install -e '.[ocr]'`; downloads nothing.
"""

from __future__ import annotations

import os
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.rewards.api import ByteArray

ROUNDS = 3
SENTENCE = "The quick brown fox jumps over the lazy dog. "
PRINT = 8
"""Height of the small print of the page, in pixels."""


def sign(side: int) -> ByteArray:
    """A picture with two words."""
    image = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(side / 8)
    ImageDraw.Draw(image).text((side / 16, side / 3), "Hello World", fill="black", font=font)
    return np.asarray(image)


def page(side: int) -> ByteArray:
    """A picture full of small print."""
    image = Image.new("RGB", (side, side), "white")
    for top in range(0, side, PRINT * 5 // 4):
        ImageDraw.Draw(image).text((2, top), SENTENCE * 8, fill="black", font=ImageFont.load_default(PRINT))
    return np.asarray(image)


PICTURES = {f"two words, {side} x {side}": sign(side) for side in (64, 256, 512, 1024, 2048)} | {
    "1 x 1": np.zeros((1, 1, 3), np.uint8),
    "32 x 1": np.zeros((32, 1, 3), np.uint8),
    "1 x 32": np.zeros((1, 32, 3), np.uint8),
    "a page of small print, 960 x 960": page(960),
}


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from reward_servers.scorers.ocr import OcrScorer

    scorer = OcrScorer.load(None, "cpu")
    for name, picture_HWC in PICTURES.items():
        seconds = []
        for _ in range(ROUNDS):
            started = time.process_time()
            text = scorer.read(picture_HWC)
            seconds.append(time.process_time() - started)
        print(f"{min(seconds):7.3f} s  {name}: {len(text)} characters read", flush=True)


if __name__ == "__main__":
    main()
