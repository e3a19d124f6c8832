"""GenEval's rules, every number worked out by hand from evaluate_images.py (and gen_eval.py for the score by parts)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from common.errors import RewardRejected
from reward_servers.scorers.geneval.rules import (
    CLASSES,
    Box,
    Detection,
    Verdict,
    judge_by_parts,
    judge_strictly,
    overlap,
    parse_task,
    relations,
    select,
)

BOX: Box = (0, 0, 10, 10)


def one(label: str, confidence: float = 0.95, box: Box = BOX) -> Detection:
    return Detection(label, confidence, box)


def no_colors(objects: Sequence[Detection]) -> list[str]:
    raise AssertionError("no colour is demanded")


def metadata(
    *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = (), tag: str = "two_object"
) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo"}


def wanted(label: str, count: int = 1, **rest: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **rest}


def strictly(demand: dict[str, Any], *objects: Detection, colors: Any = no_colors) -> Verdict:
    task = parse_task(demand)
    return judge_strictly(task, select(objects, task.tag), colors)


def by_parts(demand: dict[str, Any], *objects: Detection, colors: Any = no_colors) -> Verdict:
    task = parse_task(demand)
    return judge_by_parts(task, select(objects, task.tag), colors)


def test_the_classes_are_cocos_in_order() -> None:
    assert (len(CLASSES), len(set(CLASSES))) == (80, 80)
    known = {0: "person", 9: "traffic light", 17: "horse", 41: "cup", 62: "tv", 64: "computer mouse", 79: "toothbrush"}
    assert {index: CLASSES[index] for index in known} == known


@pytest.mark.parametrize(
    ("objects", "score"),
    [([one("dog")], 1), ([one("dog"), one("dog"), one("cat")], 1), ([one("cat")], 0), ([], 0), ([one("dog", 0.3)], 0)],
)
def test_single_object(objects: list[Detection], score: int) -> None:
    """More than demanded is no fault; a confidence of just the threshold is no object."""
    assert strictly(metadata(wanted("dog"), tag="single_object"), *objects).score == score


def test_two_objects_are_both_needed_and_reasons_are_given() -> None:
    demand = metadata(wanted("dog"), wanted("cup", 2))
    assert strictly(demand, one("dog"), one("cup"), one("cup")) == Verdict(1.0, ())
    assert strictly(demand, one("cup")) == Verdict(0.0, ("expected dog >= 1, found 0", "expected cup >= 2, found 1"))


@pytest.mark.parametrize(("dogs", "score"), [(1, 0), (2, 1), (3, 0)])
def test_counting_is_exact_through_exclude(dogs: int, score: int) -> None:
    demand = metadata(wanted("dog", 2), exclude=[wanted("dog", 3)], tag="counting")
    assert strictly(demand, *[one("dog")] * dogs).score == score


def test_counting_wants_more_confidence() -> None:
    demand = metadata(wanted("dog", 2), exclude=[wanted("dog", 3)], tag="counting")
    assert strictly(demand, one("dog"), one("dog", 0.91), one("dog", 0.9)).score == 1
    assert strictly(demand, one("dog"), one("dog", 0.9)).reasons == ("expected dog >= 2, found 1",)


def test_at_most_16_objects_of_a_class_are_kept_the_best_first() -> None:
    objects = [one("dog", 0.5 + index / 100) for index in range(20)]
    kept = select(objects, "single_object")["dog"]
    assert [detection.confidence for detection in kept] == [detection.confidence for detection in objects[:3:-1]]


def test_overlap_counts_the_last_pixel() -> None:
    """(0, 0, 9, 9) and (5, 0, 14, 9) are 10 x 10 each and share 5 x 10: 50 / 150."""
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0


def test_overlapping_boxes_are_merged_only_when_asked() -> None:
    boxes: list[Box] = [(0, 0, 9, 9), (5, 0, 14, 9), (30, 0, 39, 9)]
    objects = [one("dog", 0.9 - index / 10, box) for index, box in enumerate(boxes)]
    twins = [*objects, one("dog", 0.99, boxes[0]), one("cat", 0.9, boxes[0])]
    # By default not even identical boxes are.
    assert len(select(twins, "colors")["dog"]) == 4
    assert [detection.box for detection in select(twins, "colors", 0.34)["dog"]] == boxes
    assert [detection.box for detection in select(objects, "colors", 0.3)["dog"]] == [boxes[0], boxes[2]]
    assert len(select(twins, "colors", 0.1)["cat"]) == 1


def test_color_is_asked_of_the_most_confident_objects_only() -> None:
    asked: list[list[float]] = []

    def colors(objects: Sequence[Detection]) -> list[str]:
        asked.append([detection.confidence for detection in objects])
        return ["red", "blue"][: len(objects)]

    dogs = [one("dog", 0.8), one("dog", 0.99), one("dog", 0.9)]
    assert strictly(metadata(wanted("dog", 1, color="red"), tag="colors"), *dogs, colors=colors).score == 1
    verdict = strictly(metadata(wanted("dog", 2, color="red"), tag="colors"), *dogs, colors=colors)
    assert verdict == Verdict(0.0, ("expected red dog >= 2, found red, blue",))
    assert asked == [[0.99], [0.99, 0.9]]


def test_color_is_not_asked_when_objects_are_missing() -> None:
    assert strictly(metadata(wanted("dog", 2, color="red"), tag="colors"), one("dog")).score == 0


def test_attributes_are_bound_to_their_objects() -> None:
    demand = metadata(wanted("dog", color="red"), wanted("cup", color="blue"), tag="color_attr")
    right = {"dog": "red", "cup": "blue"}
    swapped = {"dog": "blue", "cup": "red"}
    for names, score in ((right, 1), (swapped, 0)):
        verdict = strictly(demand, one("dog"), one("cup"), colors=lambda found, n=names: [n[found[0].label]])
        assert verdict.score == score


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-20, 0, -10, 10), {"left of"}),
        ((20, 0, 30, 10), {"right of"}),
        ((0, -20, 10, -10), {"above"}),
        ((0, 20, 10, 30), {"below"}),
        ((20, 20, 30, 30), {"right of", "below"}),
        # Offset (20, 10): less 0.1 * 20 it is (18, 8), over its length 22.36 (0.80, 0.36).
        ((20, 10, 30, 20), {"right of"}),
        # Offset (2, 0) is taken whole by a tenth of both sizes; (3, 0) leaves 1 / 3 of its length; (5, 0) leaves 0.6.
        ((2, 0, 12, 10), set()),
        ((3, 0, 13, 10), set()),
        ((5, 0, 15, 10), {"right of"}),
        # Offset (4, 0) leaves 2 / 4: not more than half.
        ((4, 0, 14, 10), set()),
        (BOX, set()),
    ],
)
def test_relations_by_hand(box: Box, expected: set[str]) -> None:
    assert relations(box, BOX) == expected


def test_position_holds_for_every_pair() -> None:
    demand = metadata(wanted("dog"), wanted("cup", 2, position=["left of", 0]), tag="position")
    dog = one("dog", box=(100, 0, 110, 10))
    left, other_left, right = (one("cup", box=box) for box in ((0, 0, 10, 10), (50, 0, 60, 10), (200, 0, 210, 10)))
    assert strictly(demand, dog, left, other_left).score == 1
    assert strictly(demand, dog, left, right).reasons == ("expected cup left of dog, found right of it",)
    assert strictly(demand, left, other_left).reasons == (
        "expected dog >= 1, found 0",
        "no target for cup to be left of",
    )
    above_it = one("dog", box=(2, 1, 12, 11))
    assert strictly(demand, above_it, left, left).reasons == ("expected cup left of dog, found neither side of it",)


def test_position_looks_at_the_most_confident_objects() -> None:
    demand = metadata(wanted("dog"), wanted("cup", position=("right of", 0)), tag="position")
    dog, far_right = one("dog"), one("cup", 0.9, (50, 0, 60, 10))
    better_left = one("cup", 0.99, (-60, 0, -50, 10))
    assert strictly(demand, dog, far_right).score == 1
    assert strictly(demand, dog, far_right, better_left).score == 0


def test_excluded_objects_fail_the_image() -> None:
    demand = metadata(wanted("dog"), exclude=[wanted("cat")])
    assert strictly(demand, one("dog")).score == 1
    assert strictly(demand, one("dog"), one("cat")).reasons == ("expected cat < 1, found 1",)


@pytest.mark.parametrize(
    ("found", "score"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 2 / 3), (6, 0.0), (16, -10 / 3)]
)
def test_a_count_by_parts(found: int, score: float) -> None:
    demand = metadata(wanted("dog", 3), exclude=[wanted("dog", 4)], tag="counting")
    assert by_parts(demand, *[one("dog")] * found).score == pytest.approx(score)


def test_colors_by_parts() -> None:
    demand = metadata(wanted("dog", 2, color="red"), wanted("cup"), tag="color_attr")
    two, cup = [one("dog"), one("dog")], one("cup")
    # Parts: dogs, their colour, cup.
    assert by_parts(demand, *two, cup, colors=lambda _: ["red", "red"]) == Verdict(1.0, ())
    assert by_parts(demand, *two, cup, colors=lambda _: ["red", "blue"]).score == pytest.approx((1 + 0.5 + 1) / 3)
    assert by_parts(demand, *two, colors=lambda _: ["green", "blue"]).score == pytest.approx((1 + 0 + 0) / 3)
    # One dog: half the count, and its colour is a part of score 0 that is not looked at.
    assert by_parts(demand, one("dog"), cup).score == pytest.approx((0.5 + 0 + 1) / 3)


def test_positions_by_parts() -> None:
    demand = metadata(wanted("dog"), wanted("cup", position=["above", 0]), tag="position")
    dog, above, below = one("dog"), one("cup", box=(0, -50, 10, -40)), one("cup", box=(0, 50, 10, 60))
    # Parts: dog, cup, position.
    assert by_parts(demand, dog, above).score == 1
    assert by_parts(demand, dog, below).score == pytest.approx(2 / 3)
    assert by_parts(demand, above).score == pytest.approx((0 + 1 + 0) / 3)
    assert by_parts(demand, dog, above, below).score == pytest.approx((1 + 0 + 0) / 3)


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        ({}, "'tag'"),
        ({"tag": "count", "include": [wanted("dog")]}, "'count'"),
        ({"tag": "colors"}, "'include'"),
        ({"tag": "colors", "include": "dog"}, "a list of requirements"),
        (metadata(), "nothing to look for"),
        ({"tag": "colors", "include": ["dog"]}, "a requirement is a str"),
        (metadata(wanted("dogs")), "'dogs'"),
        (metadata(wanted(["dog"])), "class"),  # type: ignore[arg-type]
        (metadata(wanted("dog", 0)), "count 0"),
        (metadata(wanted("dog", True)), "count True"),
        (metadata({"class": "dog"}), "count None"),
        (metadata(wanted("dog", color="gray")), "'gray'"),
        (metadata(wanted("dog", color=["red"])), "color"),
        (metadata(wanted("dog"), wanted("cup", position=["near", 0])), "near"),
        (metadata(wanted("dog"), wanted("cup", position="above")), "above"),
        (metadata(wanted("dog"), wanted("cup", position=["above", 1])), "earlier requirement"),
        (metadata(wanted("dog"), wanted("cup", position=["above", -1])), "earlier requirement"),
        (metadata(wanted("dog", position=["above", 0])), "earlier requirement"),
        (metadata(wanted("dog"), exclude=[wanted("dogs")]), "'dogs'"),
        (metadata(*[wanted("dog")] * 17), "17 entries, at most 16"),
    ],
)
def test_metadata_that_is_not_genevals_is_rejected(demand: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardRejected, match=message) as caught:
        parse_task(demand)
    assert caught.value.cause == "request"
