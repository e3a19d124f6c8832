"""The table of an evaluation: columns, means and intervals, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learner.tools.score_table import (
    PUBLISHED_UNITS,
    Interval,
    ScoredPrompt,
    columns,
    interval,
    markdown_table,
    mean_over_tags,
    table,
    tables_by_tag,
)
from reward_servers.scorers import BUILT_IN_SCORERS, clipscore, pickscore


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_columns_are_the_published_ones_in_their_order_then_the_others() -> None:
    asked = [
        "mine",
        "ocr",
        "hps",
        "geneval2",
        "clipscore",
        "pickscore",
        "image_reward",
        "aesthetic",
        "hpsv3",
        "geneval",
    ]
    assert list(columns([*asked, "other"])) == [
        *("CLIPScore", "Aesthetic", "PickScore", "HPSv2", "ImageReward", "HPSv3", "GenEval", "GenEval2", "OCR"),
        *("mine", "other"),
    ]
    assert columns(["hpsv2", "hps"]) == {"HPSv2": "hpsv2", "hps": "hps"}


def test_an_interval_by_hand() -> None:
    """Sample deviation of 1, 2, 3, 4 is sqrt(5 / 3); over sqrt(4) prompts."""
    found = interval(scores(1, 2, 3, 4))
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(1.96 * math.sqrt(5 / 3) / 2)
    assert str(found) == "2.5000 ± 1.2652"


def test_equal_prompts_have_no_width_and_a_single_one_has_none_to_tell() -> None:
    assert interval(scores(0.5, 0.5)) == Interval(0.5, 0.0)
    assert str(interval(scores(0.5))) == "0.5000"


def test_the_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 100)).astype(np.float32)
    covered = np.mean([abs(found.mean) <= found.half_width for found in map(interval, draws)])
    assert 0.93 <= covered <= 0.965


def test_images_of_a_prompt_count_once() -> None:
    """Two prompts of three images: the interval is that of two numbers."""
    scored = [ScoredPrompt({"ocr": scores(0, 0, 0)}), ScoredPrompt({"ocr": scores(1, 1, 1)})]
    assert table(scored, {})["OCR"] == interval(scores(0, 1))


def test_geneval_is_the_mean_over_tags_and_no_other_reward_is() -> None:
    """Three prompts count, one is of colours: .5 (2/3 + 0), where the mean over prompts is .5."""
    values = [("counting", 1), ("counting", 1), ("counting", 0), ("colors", 0)]
    scored = [ScoredPrompt({"geneval": scores(v), "ocr": scores(v)}, tag) for tag, v in values]
    cells = table(scored, {})
    assert cells["GenEval"].mean == pytest.approx(1 / 3)
    assert cells["OCR"].mean == 0.5
    assert {tag: row["GenEval"].mean for tag, row in tables_by_tag(scored, {}).items()} == {
        "counting": pytest.approx(2 / 3),
        "colors": 0.0,
    }
    assert table([*scored, ScoredPrompt(scored[0].scores_G)], {})["GenEval"].mean == pytest.approx(3 / 5)


def test_errors_of_tags_add_as_squares() -> None:
    one, two = interval(scores(0, 1)), interval(scores(1, 1, 0))
    found = mean_over_tags(scores(0, 1, 1, 1, 0), ["a", "a", "b", "b", "b"])
    assert found.half_width == pytest.approx(math.hypot(one.half_width, two.half_width) / 2)


def test_published_units_undo_what_our_servers_divide_by() -> None:
    """PickScore is a logit again; CLIPScore is a cosine in both, since logits are 100 cosines."""
    assert {BUILT_IN_SCORERS["pickscore"]: pickscore.SCORE_DIVISOR} == PUBLISHED_UNITS
    assert clipscore.SCORE_DIVISOR == 100
    cells = table([ScoredPrompt({"pickscore": scores(0.5)})] * 2, {"pickscore": 26.0})
    assert cells["PickScore"] == Interval(13.0, 0.0)


def test_markdown_by_hand() -> None:
    rows = {"mine": {"OCR": Interval(0.5, 0.25)}, "theirs": {"OCR": Interval(1.0, math.nan)}}
    assert markdown_table("", rows).splitlines() == [
        "|  | OCR |",
        "| --- | --- |",
        "| mine | 0.5000 ± 0.2500 |",
        "| theirs | 1.0000 |",
    ]
