"""Draw the gallery of a finished run as one picture: a row a policy, a column a prompt, a green frame where gold is 1.

python benchmarks/gallery.py runs/shapes docs/images/shapes_gallery.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIDE = 128
"""Pixels an image is drawn with."""
FRAME = 4
LABEL_WIDTH = 132
GAP = 6
GREEN, GREY = (30, 160, 70), (205, 205, 205)
LABELS = {"cold_start": "cold start, 4 steps", "rtdmd": "RTDMD, 4 steps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    entries = json.loads((arguments.run_dir / "samples" / "gallery.json").read_text())
    draw_gallery(entries, arguments.run_dir / "samples").save(arguments.out, optimize=True)


def draw_gallery(entries: list[dict[str, Any]], samples: Path) -> Image.Image:
    policies = list(entries[0]["policies"])
    cell = SIDE + 2 * FRAME
    canvas = Image.new("RGB", (LABEL_WIDTH + len(entries) * (cell + GAP), len(policies) * (cell + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, policy in enumerate(policies):
        top = row * (cell + GAP)
        draw.text((6, top + cell // 2), _label(policy), fill="black", anchor="lm", font_size=14)
        for column, entry in enumerate(entries):
            shown = entry["policies"][policy]
            left = LABEL_WIDTH + column * (cell + GAP)
            frame = GREEN if shown["scores"].get("gold") == 1 else GREY
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=frame, width=FRAME)
            picture = Image.open(samples / shown["image"]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + FRAME, top + FRAME))
    return canvas


def _label(policy: str) -> str:
    if policy.startswith("teacher_"):
        return f"teacher, {policy.removeprefix('teacher_')} steps"
    return LABELS.get(policy, policy)


if __name__ == "__main__":
    main()
