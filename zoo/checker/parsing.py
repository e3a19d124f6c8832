"""Gold checker: parses an image into things and background, and decides whether it obeys a caption.

A small fully convolutional detector in the style of CenterNet ("Objects as Points", arXiv 1904.07850). For each cell of
a 16 x 16 map it predicts whether a thing's centre lies in it, where exactly, its attributes, and whether the image is
damaged there. Gold is strict: the things found are exactly those asked for, and nothing is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.half_weights import load_full, rebuildable, save_half
from zoo.world.scenes import BACKGROUNDS, CANVAS, COLOURS, SHAPES, SIZES, Request, Thing, obeys, parse_caption

STRIDE = 4
"""Pixels per cell of the output map."""
COLOUR_NAMES, SHAPE_NAMES, SIZE_NAMES = tuple(COLOURS), tuple(SHAPES), tuple(SIZES)
BACKGROUND_NAMES = (*BACKGROUNDS, "neither")
WIDTH, BLOCKS = 56, 3
_BATCH = 128
_WEIGHTS, _CONFIG = "checker.safetensors", "config.json"


@dataclass(frozen=True)
class CellMaps:
    """The network's output per cell: logits, except `offset_B2hw`, which is in cells from the cell's middle."""

    centre_Bhw: Tensor
    offset_B2hw: Tensor
    colour_Bkhw: Tensor
    shape_Bkhw: Tensor
    size_Bkhw: Tensor
    damage_Bhw: Tensor
    background_Bk: Tensor


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features + self.body(features))


class CheckerNet(nn.Module):
    """Image [B, 3, 64, 64] in [0, 1] -> `CellMaps` on a 16 x 16 grid."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.body = nn.Sequential(*[_Residual(width) for _ in range(blocks)])
        self.splits = (1, 2, len(COLOUR_NAMES), len(SHAPE_NAMES), len(SIZE_NAMES), 1)
        self.cells = nn.Conv2d(width, sum(self.splits), 1)
        self.background = nn.Linear(2 * width, len(BACKGROUND_NAMES))

    def forward(self, image_BCHW: Tensor) -> CellMaps:
        features = self.body(self.stem((image_BCHW - 0.5) * 2))
        centre, offset, colour, shape, size, damage = self.cells(features).split(self.splits, 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return CellMaps(centre[:, 0], offset, colour, shape, size, damage[:, 0], self.background(pooled))


@dataclass(frozen=True)
class Parse:
    """The checker's reading of an image.

    Attributes:
        things: the things found, unordered.
        background: a background word, or "neither".
        damage: probability of damage in the worst cell.
    """

    things: tuple[Thing, ...]
    background: str
    damage: float


@dataclass(frozen=True)
class Thresholds:
    """Probabilities above which a centre is a thing and damage spoils the image; calibrated."""

    centre: float = 0.4
    damage: float = 0.5


class GoldChecker:
    """A trained network and its calibrated thresholds."""

    def __init__(self, net: CheckerNet, thresholds: Thresholds) -> None:
        self.net = net.eval()
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.thresholds = thresholds

    @classmethod
    def load(cls, directory: Path) -> GoldChecker:
        """Read a checker saved by `save`.

        Raises:
            ModelError: the directory does not contain a complete checker.
        """
        with rebuildable("checker", directory):
            config = json.loads((directory / _CONFIG).read_text())
            net, thresholds = CheckerNet(config["width"], config["blocks"]), Thresholds(**config["thresholds"])
            net.load_state_dict(load_full(directory / _WEIGHTS))
        return cls(net, thresholds)

    def save(self, directory: Path) -> None:
        """Write float16 weights and the thresholds."""
        save_half(self.net.state_dict(), directory / _WEIGHTS)
        config = {"width": WIDTH, "blocks": BLOCKS, "thresholds": asdict(self.thresholds)}
        (directory / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")

    @torch.inference_mode()
    def parse(self, images_BHWC: npt.NDArray[np.generic]) -> list[Parse]:
        """Read images, uint8 [B, 64, 64, 3] or float in [0, 1]."""
        pixels = to_pixels(images_BHWC)
        parses: list[Parse] = []
        for start in range(0, len(pixels), _BATCH):
            parses += self._read(self.net(pixels[start : start + _BATCH]))
        return parses

    def _read(self, maps: CellMaps) -> list[Parse]:
        centre = maps.centre_Bhw.sigmoid()
        highest = F.max_pool2d(centre[:, None], 5, stride=1, padding=2)[:, 0]
        peaks = (centre == highest) & (centre >= self.thresholds.centre)
        offsets = maps.offset_B2hw.numpy()
        words = [logits.argmax(1).numpy() for logits in (maps.size_Bkhw, maps.colour_Bkhw, maps.shape_Bkhw)]
        damage = maps.damage_Bhw.sigmoid().amax((1, 2)).tolist()
        backgrounds = maps.background_Bk.argmax(1).tolist()
        things: list[list[Thing]] = [[] for _ in backgrounds]
        for sample, row, column in peaks.nonzero().tolist():
            size, colour, shape = (int(index[sample, row, column]) for index in words)
            dx, dy = offsets[sample, :, row, column]
            x, y = (column + 0.5 + float(dx)) * STRIDE, (row + 0.5 + float(dy)) * STRIDE
            things[sample].append(Thing(SIZE_NAMES[size], COLOUR_NAMES[colour], SHAPE_NAMES[shape], x, y))
        rows = zip(things, backgrounds, damage, strict=True)
        return [Parse(tuple(found), BACKGROUND_NAMES[index], worst) for found, index, worst in rows]

    def verdict(self, images_BHWC: npt.NDArray[np.generic], captions: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether each image is intact and exactly what its caption asks for, bool [B].

        Raises:
            ValueError: a caption is not one of the shapes world, or the counts differ.
        """
        requests = [parse_caption(caption) for caption in captions]
        pairs = zip(self.parse(images_BHWC), requests, strict=True)
        return np.array([self._obeys(parse, request) for parse, request in pairs], bool)

    def _obeys(self, parse: Parse, request: Request) -> bool:
        return parse.damage < self.thresholds.damage and obeys(request, parse.things, parse.background)


def to_pixels(images_BHWC: npt.NDArray[np.generic]) -> Tensor:
    """uint8 [B, 64, 64, 3] or float in [0, 1] -> float32 [B, 3, 64, 64] in channels-last memory.

    Raises:
        ValueError: another shape.
    """
    if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != (CANVAS, CANVAS, 3):
        raise ValueError(f"images must be [B, {CANVAS}, {CANVAS}, 3], not {list(images_BHWC.shape)}")
    pixels = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
