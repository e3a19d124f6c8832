"""Gold reader: a small network that reads the word, its colour, the background and the place of an image.

It shares nothing with the OCR engine. Every letter is one of the world's or unreadable, so a wrong, blended or broken
letter cannot pass for a right one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zoo.checker.parsing import to_pixels
from zoo.half_weights import load_full, rebuildable, save_half
from zoo.text.captions import LETTERS, LONGEST, PLACES, Request, parse_caption
from zoo.world.scenes import BACKGROUNDS, COLOURS

UNREADABLE, NOTHING = len(LETTERS), len(LETTERS) + 1
"""Classes of a slot after those of the letters."""
SLOT_CLASSES = len(LETTERS) + 2
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = (*BACKGROUNDS, "neither")
WIDTH = 64
MAP = 16
"""Cells per side of the feature map."""
_BATCH = 128
_WEIGHTS, _CONFIG = "reader.safetensors", "config.json"


@dataclass(frozen=True)
class ReaderOutput:
    """Logits. `letters_BLk` has a row per slot of the word, from its first letter on."""

    letters_BLk: Tensor
    colour_Bk: Tensor
    background_Bk: Tensor
    place_Bk: Tensor
    damage_B: Tensor


class ReaderNet(nn.Module):
    """Image [B, 3, 64, 64] in [0, 1] -> `ReaderOutput`."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        plan = ((3, width // 2, 5, 2), (width // 2, width, 3, 2), (width, width, 3, 1), (width, width, 3, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, side, stride in plan:
            layers += [
                nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.row_weight = nn.Conv2d(width, 1, 1)
        self.columns = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU())
        self.letters = nn.Linear(width * MAP, LONGEST * SLOT_CLASSES)
        self.place = nn.Linear(width * MAP, len(PLACES))
        self.splits = (len(COLOUR_NAMES), len(BACKGROUND_NAMES), 1)
        self.image = nn.Linear(2 * width, sum(self.splits))

    def forward(self, image_BCHW: Tensor) -> ReaderOutput:
        features = self.body((image_BCHW - 0.5) * 2)
        columns = (features * self.row_weight(features).softmax(2)).sum(2)
        letters = self.letters(self.columns(columns).flatten(1)).unflatten(1, (LONGEST, SLOT_CLASSES))
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        colour, background, damage = self.image(pooled).split(self.splits, 1)
        return ReaderOutput(letters, colour, background, self.place(features.amax(3).flatten(1)), damage[:, 0])


@dataclass(frozen=True)
class Reading:
    """What an image shows; an unreadable letter is "?". `damage` is the probability that the image is damaged."""

    word: str
    colour: str
    background: str
    place: str
    damage: float

    def obeys(self, request: Request, threshold: float) -> bool:
        """Whether this is exactly what was asked for, and intact."""
        return self.damage < threshold and Request(self.word, self.colour, self.background, self.place) == request


class Reader:
    """A trained network, and the damage from which on an image is spoilt."""

    def __init__(self, net: ReaderNet, threshold: float = 0.5) -> None:
        self.net = net.eval()
        self.threshold = threshold

    @classmethod
    def load(cls, directory: Path) -> Reader:
        """Read what `save` wrote.

        Raises:
            ModelError: the directory does not contain a complete reader.
        """
        with rebuildable("reader", directory):
            config = json.loads((directory / _CONFIG).read_text())
            net, threshold = ReaderNet(config["width"]), float(config["threshold"])
            net.load_state_dict(load_full(directory / _WEIGHTS))
        return cls(net, threshold)

    def save(self, directory: Path) -> None:
        """Write float16 weights and the threshold."""
        save_half(self.net.state_dict(), directory / _WEIGHTS)
        (directory / _CONFIG).write_text(json.dumps({"width": WIDTH, "threshold": self.threshold}, indent=1) + "\n")

    @torch.inference_mode()
    def read(self, images_BHWC: npt.NDArray[np.generic]) -> list[Reading]:
        """Read images, uint8 [B, 64, 64, 3] or float in [0, 1]."""
        return [reading for part in to_pixels(images_BHWC).split(_BATCH) for reading in _readings(self.net(part))]

    def verdict(self, images_BHWC: npt.NDArray[np.generic], captions: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether each image is intact and exactly what its caption asks for, bool [B].

        Raises:
            ValueError: a caption is not one of the text world, or the counts differ.
        """
        requests = [parse_caption(caption) for caption in captions]
        pairs = zip(self.read(images_BHWC), requests, strict=True)
        return np.array([reading.obeys(request, self.threshold) for reading, request in pairs], bool)


def _readings(output: ReaderOutput) -> list[Reading]:
    signs = (*LETTERS, "?", " ")
    slots, damage = output.letters_BLk.argmax(-1).tolist(), output.damage_B.sigmoid().tolist()
    names = [
        [words[index] for index in logits.argmax(1).tolist()]
        for logits, words in (
            (output.colour_Bk, COLOUR_NAMES),
            (output.background_Bk, BACKGROUND_NAMES),
            (output.place_Bk, PLACES),
        )
    ]
    words = ["".join(signs[index] for index in row).rstrip() for row in slots]
    return [Reading(*fields) for fields in zip(words, *names, damage, strict=True)]
