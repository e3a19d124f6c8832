"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513; github.com/djghosh13/geneval, evaluation/evaluate_images.py).

Input: detections and a prompt's metadata. Output: a verdict and its reasons. No model and no image is used. Metadata is
a line of GenEval's evaluation_metadata.jsonl:

    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cup", "count": 1, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "cat", "count": 1}]}

All of `include` must hold and none of `exclude`; `position` is a relation to the objects of an earlier entry. There are
two scores: `judge_strictly` is GenEval's own verdict, 0 or 1; `judge_by_parts` is the mean over the parts of the prompt
that Flow-GRPO trains on (github.com/yifan123/reward-server, reward_server/gen_eval.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from common.errors import RewardRejected

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's 80 categories in COCO's order, with GenEval's names, which differ for mouse, remote and keyboard.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on
# The defaults of evaluate_images.py. A detection must exceed its threshold; counting is stricter.
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
MAX_ENTRIES = 16
"""Entries of `include` and of `exclude`; GenEval's have at most two. Each may ask CLIP for colours."""
MAX_OVERLAP = 1.0  # boxes of one class that overlap by this much are one object; at 1 nothing is merged
POSITION_THRESHOLD = 0.1

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One object: its class, confidence in [0, 1], box (left, top, right, bottom) in pixels, mask bool [H, W]."""

    label: str
    confidence: float
    box: Box
    mask_HW: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Requirement:
    """`count` objects of a class, with a colour, in a relation to the objects that met requirement number `target`."""

    label: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """The demands of a prompt, validated."""

    tag: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...]


@dataclass(frozen=True)
class Verdict:
    """The score, and the reasons why it is not 1."""

    score: float
    reasons: tuple[str, ...]


Found = Mapping[str, Sequence[Detection]]
ColorsOf = Callable[[Sequence[Detection]], Sequence[str]]


def parse_task(metadata: Mapping[str, Any]) -> Task:
    """Metadata -> Task; RewardRejected when it is not valid GenEval metadata."""
    tag = metadata.get("tag")
    if tag not in TAGS:
        _reject(f"metadata['tag'] is {tag!r}: GenEval's are {', '.join(TAGS)}")
    include = tuple(_parse_requirement(item, index) for index, item in enumerate(_entries(metadata, "include")))
    exclude = tuple(_parse_requirement(item, 0) for item in _entries(metadata, "exclude"))
    if not include:
        _reject("metadata['include'] is empty: there is nothing to look for")
    return Task(str(tag), include, exclude)


def select(detections: Iterable[Detection], tag: str, max_overlap: float = MAX_OVERLAP) -> dict[str, list[Detection]]:
    """The objects that count, by class, most confident first: above the threshold, at most 16, not overlapping."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if detection.confidence > threshold:
            found.setdefault(detection.label, []).append(detection)
    return {label: _separate(group[:MAX_OBJECTS], max_overlap) for label, group in found.items()}


def judge_strictly(task: Task, found: Found, colors_of: ColorsOf) -> Verdict:
    """1 when the image shows what is demanded, else 0. Colour and position use the most confident objects."""
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for requirement in task.include:
        objects = found.get(requirement.label, ())[: requirement.count]
        fault = None
        if len(objects) < requirement.count:
            fault = f"expected {requirement.label} >= {requirement.count}, found {len(objects)}"
        elif requirement.color is not None:
            fault = _color_fault(requirement, list(colors_of(objects)))
        if fault is None and requirement.relation is not None:
            fault = _position_fault(requirement, objects, matched[requirement.target])
        matched.append(objects if fault is None else None)
        if fault is not None:
            reasons.append(fault)
    for requirement in task.exclude:
        count = len(found.get(requirement.label, ()))
        if count >= requirement.count:
            reasons.append(f"expected {requirement.label} < {requirement.count}, found {count}")
    return Verdict(float(not reasons), tuple(reasons))


def judge_by_parts(task: Task, found: Found, colors_of: ColorsOf) -> Verdict:
    """Mean over the parts of the prompt: every count, colour and position that is demanded.

    A count scores 1 - |demanded - found| / demanded, so far too many objects score below 0. A colour scores likewise
    over the objects of that colour; a position scores 0 or 1. If the count is not exact, its colour and position
    together are one part of score 0. Departure: a position that fails is one part of score 0; the published code also
    adds a part of score 1. `exclude` has no effect, because counts are exact.
    """
    parts: list[float] = []
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for requirement in task.include:
        objects = found.get(requirement.label, ())
        parts.append(1 - abs(requirement.count - len(objects)) / requirement.count)
        fault = None
        if len(objects) != requirement.count:
            fault = f"expected {requirement.label} == {requirement.count}, found {len(objects)}"
            if requirement.color is not None or requirement.relation is not None:
                parts.append(0.0)
        elif requirement.color is not None:
            colors = list(colors_of(objects))
            parts.append(colors.count(requirement.color) / requirement.count)
            fault = _color_fault(requirement, colors)
        if fault is None and requirement.relation is not None:
            fault = _position_fault(requirement, objects, matched[requirement.target])
            parts.append(float(fault is None))
        matched.append(objects if fault is None else None)
        if fault is not None:
            reasons.append(fault)
    return Verdict(sum(parts) / len(parts), tuple(reasons))


def relations(box: Box, other: Box) -> set[str]:
    """Position of `box` relative to `other`: the centres' offset, less a tenth of both sizes, over its whole length.

    An axis counts when it is more than half of that length, so diagonal neighbours have two relations.
    """
    offset = [(box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(box[axis + 2] - box[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    revised = [
        math.copysign(max(abs(distance) - POSITION_THRESHOLD * size, 0.0), distance)
        for distance, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(distance) < 1e-3 for distance in revised):
        return set()
    across, down = (distance / math.hypot(*offset) for distance in revised)
    held = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, holds in held.items() if holds}


def overlap(box: Box, other: Box) -> float:
    """Intersection over union of two boxes that include their right and bottom pixels, as in GenEval."""
    shared = (max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3]))
    union = _area(box) + _area(other) - _area(shared)
    return _area(shared) / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _separate(objects: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """Drop each object that overlaps a more confident one by `max_overlap` or more; at 1, drop none."""
    kept: list[Detection] = []
    for candidate in objects:
        if max_overlap == 1 or all(overlap(candidate.box, other.box) < max_overlap for other in kept):
            kept.append(candidate)
    return kept


def _color_fault(requirement: Requirement, colors: list[str]) -> str | None:
    matching = colors.count(str(requirement.color))
    if matching >= requirement.count:
        return None
    return f"expected {requirement.color} {requirement.label} >= {requirement.count}, found {', '.join(colors)}"


def _position_fault(
    requirement: Requirement, objects: Sequence[Detection], targets: Sequence[Detection] | None
) -> str | None:
    """A message unless every object stands in the relation to every target."""
    if targets is None:
        return f"no target for {requirement.label} to be {requirement.relation}"
    for detection in objects:
        for target in targets:
            held = relations(detection.box, target.box)
            if requirement.relation not in held:
                place = " and ".join(sorted(held)) or "neither side of"
                return f"expected {requirement.label} {requirement.relation} {target.label}, found {place} it"
    return None


def _entries(metadata: Mapping[str, Any], key: str) -> Sequence[object]:
    entries = metadata.get(key, ())
    if not isinstance(entries, list | tuple):
        _reject(f"metadata[{key!r}] is a {type(entries).__name__}: a list of requirements is wanted")
    if len(entries) > MAX_ENTRIES:
        _reject(f"metadata[{key!r}] has {len(entries)} entries, at most {MAX_ENTRIES} are judged")
    return entries


def _parse_requirement(item: object, index: int) -> Requirement:
    if not isinstance(item, Mapping):
        _reject(f"a requirement is a {type(item).__name__}: a map with class and count is wanted")
    label, count, color = item.get("class"), item.get("count"), item.get("color")
    if label not in CLASSES:
        _reject(f"class {label!r} is not one of the 80 that GenEval detects, such as {CLASSES[0]} or {CLASSES[-1]}")
    if type(count) is not int or count < 1:
        _reject(f"count {count!r} of class {label!r} is not a whole number from 1")
    if color is not None and color not in COLORS:
        _reject(f"color {color!r} of class {label!r} is not one of {', '.join(COLORS)}")
    relation, target = _parse_position(item.get("position"), index)
    return Requirement(str(label), count, color, relation, target)


def _parse_position(position: object, index: int) -> tuple[str | None, int]:
    if position is None:
        return None, 0
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        _reject(f"position {position!r} is not [relation, index] with a relation of {', '.join(RELATIONS)}")
    if type(position[1]) is not int or not 0 <= position[1] < index:
        _reject(f"position {position!r} of requirement {index} does not name an earlier requirement")
    return position[0], position[1]


def _reject(message: str) -> NoReturn:
    raise RewardRejected("geneval", "request", message)
