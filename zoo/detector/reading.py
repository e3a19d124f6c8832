"""Detector reward, in GenEval's role (arXiv 2310.11513): counts, attributes and places, with partial credit.

A small U-Net classifies the colour and the shape of every pixel; connected pixels of one colour are a thing. It shares
nothing with the gold checker (architecture, renderer, data, seed) and does not look for damage: a damaged image loses
only what is no longer readable.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ModelError
from common.rewards.api import ByteArray, FloatArray
from zoo.half_weights import load_full, save_half
from zoo.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    CHECK_MARGIN,
    COLOURS,
    SHAPES,
    SIZES,
    Request,
    Thing,
    coverage,
    holds,
)

COLOUR_CLASSES = (*COLOURS, *BACKGROUNDS)
"""Possible colours of a pixel: of a thing or of a background."""
SHAPE_CLASSES = (*SHAPES, "nothing")
SMALLEST_AREA = 24
"""Fewer connected pixels than this are a speck and not a thing."""
MOST_PARTS = 6
"""At most this many parts of an image, the largest, are matched with the things asked for."""
SIZE_BORDER = sum(SIZES.values()) / len(SIZES)
WEIGHTS = "detector.safetensors"
NO_PART = -1
_BATCH = 128
_UNIT_RADIUS = 20.0
_UNIT_AREA = {
    shape: float(coverage(shape, CANVAS / 2, CANVAS / 2, _UNIT_RADIUS).sum()) / _UNIT_RADIUS**2 for shape in SHAPES
}
"""Area of each shape divided by its squared radius."""


def _step(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.SiLU())


class DetectorNet(nn.Module):
    """Image [B, 3, H, W] in [0, 1] -> logits of each pixel's colour [B, 8, H, W] and shape [B, 4, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.down_half = nn.Sequential(_step(3, 32, 2), _step(32, 32))
        self.down_quarter = nn.Sequential(_step(32, 48, 2), _step(48, 48))
        self.down_eighth = nn.Sequential(_step(48, 64, 2), _step(64, 64), _step(64, 64))
        self.to_quarter, self.at_quarter = nn.Conv2d(64, 48, 1), _step(48, 48)
        self.to_half, self.at_half = nn.Conv2d(48, 32, 1), _step(32, 32)
        self.pixels = nn.Conv2d(32, 4 * (len(COLOUR_CLASSES) + len(SHAPE_CLASSES)), 1)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        half = self.down_half(image_BCHW * 2 - 1)
        quarter = self.down_quarter(half)
        eighth = self.down_eighth(quarter)
        quarter = self.at_quarter(quarter + F.interpolate(self.to_quarter(eighth), scale_factor=2.0))
        half = self.at_half(half + F.interpolate(self.to_half(quarter), scale_factor=2.0))
        colour, shape = F.pixel_shuffle(self.pixels(half), 2).split((len(COLOUR_CLASSES), len(SHAPE_CLASSES)), 1)
        return colour, shape


@dataclass(frozen=True)
class Part:
    """Connected pixels of one colour: place, size, and the mean probability of each colour and shape word in them."""

    x: float
    y: float
    area: int
    colours: dict[str, float]
    shapes: dict[str, float]

    def as_thing(self) -> Thing:
        """The most probable thing for this part."""
        shape = max(SHAPES, key=self.shapes.__getitem__)
        return Thing(self.size(shape), max(COLOURS, key=self.colours.__getitem__), shape, self.x, self.y)

    def size(self, shape: str) -> str:
        """The size word that fits its area, if it has this shape."""
        small, big = sorted(SIZES, key=SIZES.__getitem__)
        return big if (self.area / _UNIT_AREA[shape]) ** 0.5 > SIZE_BORDER else small


@dataclass(frozen=True)
class Reading:
    """The parts of an image, largest first, and the mean probability of each background word outside them."""

    parts: tuple[Part, ...]
    backgrounds: dict[str, float]


def connected(classes_BHW: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number the 4-connected regions of equal class: int64 [B, H, W], equal within a region, different between regions.

    A region's number is the highest pixel index in it. Each round takes the neighbours' higher number and then follows
    it to the number found there, so long regions need few rounds.
    """
    count = classes_BHW.shape[0]
    labels = np.broadcast_to(np.arange(classes_BHW[0].size).reshape(classes_BHW.shape[1:]), classes_BHW.shape).copy()
    beside = classes_BHW[:, :, 1:] == classes_BHW[:, :, :-1]
    beneath = classes_BHW[:, 1:] == classes_BHW[:, :-1]
    while True:
        before = labels.copy()
        _take_higher(labels[:, :, 1:], labels[:, :, :-1], beside)
        _take_higher(labels[:, 1:], labels[:, :-1], beneath)
        flat = labels.reshape(count, -1)
        labels = np.take_along_axis(flat, flat, 1).reshape(labels.shape)
        if np.array_equal(labels, before):
            return labels


def _take_higher(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64], joined: npt.NDArray[np.bool_]) -> None:
    """Give two connected, overlapping views the higher of their numbers, in place."""
    higher = np.maximum(one, other)
    for view in (one, other):
        np.maximum(view, higher, out=view, where=joined)


class Detector:
    """A trained network that reads images."""

    def __init__(self, net: DetectorNet) -> None:
        self.net = net.eval()
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, directory: Path) -> Detector:
        """Read a detector saved by `save`; ModelError when it does not exist."""
        net = DetectorNet()
        try:
            net.load_state_dict(load_full(directory / WEIGHTS))
        except RuntimeError as error:
            raise ModelError(f"{directory / WEIGHTS} holds another network: {error}") from error
        return cls(net)

    def save(self, directory: Path) -> None:
        """Write float16 weights."""
        save_half(self.net.state_dict(), directory / WEIGHTS)

    @torch.inference_mode()
    def read(self, images_BHWC: ByteArray) -> list[Reading]:
        """Read images, uint8 [B, H, W, 3]."""
        pixels = torch.tensor(images_BHWC).permute(0, 3, 1, 2).float() / 255
        readings: list[Reading] = []
        for chunk in pixels.split(_BATCH):
            colour, shape = (logits.softmax(1) for logits in self.net(chunk))
            winners = colour.argmax(1).numpy()
            labels = np.where(winners < len(COLOURS), connected(winners), NO_PART)
            maps = zip(labels, colour.numpy(), shape.numpy(), strict=True)
            readings += [_reading(*one) for one in maps]
        return readings


def _reading(labels_HW: npt.NDArray[np.int64], colour_kHW: FloatArray, shape_kHW: FloatArray) -> Reading:
    """Collect one image's parts. Two colours never share a pixel, so one map holds the regions of all colours."""
    labels, areas = np.unique(labels_HW, return_counts=True)
    order = np.argsort(-areas, kind="stable")
    kept = [labels[index] for index in order if labels[index] != NO_PART and areas[index] >= SMALLEST_AREA]
    outside = labels_HW == NO_PART
    levels = colour_kHW[len(COLOURS) :, outside].mean(1) if outside.any() else np.zeros(len(BACKGROUNDS))
    parts = [_part(labels_HW == label, colour_kHW, shape_kHW) for label in kept]
    return Reading(tuple(parts), dict(zip(BACKGROUNDS, levels.tolist(), strict=True)))


def _part(inside_HW: npt.NDArray[np.bool_], colour_kHW: FloatArray, shape_kHW: FloatArray) -> Part:
    rows, columns = inside_HW.nonzero()
    colours = dict(zip(COLOUR_CLASSES, colour_kHW[:, inside_HW].mean(1).tolist(), strict=True))
    shapes = dict(zip(SHAPE_CLASSES, shape_kHW[:, inside_HW].mean(1).tolist(), strict=True))
    return Part(float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, len(rows), colours, shapes)


def partial_credit(request: Request, reading: Reading) -> float:
    """The mean, in [0, 1], over everything asked for: the count, each thing's words, each relation, the background.

    Colour, shape and background count with their probability, so a clearer image scores slightly higher. Parts are
    assigned to things in the image's favour; a thing without a part scores nothing, and neither do its relations.
    """
    asked = len(request.things)
    count = max(0.0, 1 - abs(len(reading.parts) - asked) / asked)
    checks = 2 + 3 * asked + len(request.relations)
    seen = min(len(reading.parts), MOST_PARTS)
    # Index -1 stands for no part; removing equal orders keeps the search at 229 at most.
    orders = set(itertools.permutations([*range(seen), *([-1] * asked)], asked))
    best = max(_assigned_credit(request, [reading.parts[i] if i >= 0 else None for i in order]) for order in orders)
    return (count + reading.backgrounds[request.background] + best) / checks


def _assigned_credit(request: Request, parts: Sequence[Part | None]) -> float:
    credit = 0.0
    for part, (size, colour, shape) in zip(parts, request.things, strict=True):
        if part is not None:
            credit += part.colours[colour] + part.shapes[shape] + (part.size(shape) == size)
    first = parts[0]
    for relation, other in zip(request.relations, parts[1:], strict=True):
        if first is not None and other is not None:
            credit += holds(relation, first.as_thing(), other.as_thing(), CHECK_MARGIN)
    return credit
