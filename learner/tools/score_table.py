"""Table of an evaluation: the published columns, means, and their uncertainty. Shapes: P prompts.

A mean is over prompts, each the mean over its images, and so is its 95 % interval: 1.96 standard errors of the mean,
the normal approximation. Images of one prompt are similar, so an interval over images would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.types import FloatArray

COLUMNS = {
    "CLIPScore": ("clipscore",),
    "Aesthetic": ("aesthetic",),
    "PickScore": ("pickscore",),
    "HPSv2": ("hps", "hpsv2"),
    "ImageReward": ("image_reward", "imagereward"),
    "HPSv3": ("hpsv3",),
    "GenEval": ("geneval",),
    "GenEval2": ("geneval2",),
    "OCR": ("ocr",),
}
"""Published columns, in their order, and the names of their rewards here."""

PUBLISHED_UNITS = {
    "reward_servers.scorers.pickscore:PickScoreScorer": 26.0,
}
"""Our servers divide PickScore by 26, as the trainer uses it; published tables have the logit."""

TAG = "tag"
MEAN_OVER_TAGS = ("GenEval",)
"""GenEval's score is the mean over its six tasks, regardless of how many prompts each has."""

Z_95 = 1.96


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; NaN for a single prompt, which has no spread."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half_width) else f"{self.mean:.4f} ± {self.half_width:.4f}"


@dataclass(frozen=True)
class ScoredPrompt:
    """Scores of one prompt's G images by each reward [G], and the prompt's tag, if any."""

    scores_G: Mapping[str, FloatArray]
    tag: str | None = None


def columns(rewards: Sequence[str]) -> dict[str, str]:
    """Title -> reward: published ones in their order with published names, then the others in the given order."""
    titles = {}
    for title, names in COLUMNS.items():
        known = [reward for reward in rewards if reward in names]
        if known:
            titles[title] = known[0]
    others = [reward for reward in rewards if reward not in titles.values()]
    return titles | {reward: reward for reward in others}


def interval(values_P: FloatArray) -> Interval:
    """Mean over prompts and its normal 95 % interval."""
    values_P = np.asarray(values_P, np.float64)
    if len(values_P) < 2:
        return Interval(float(values_P.mean()), math.nan)
    return Interval(float(values_P.mean()), float(Z_95 * values_P.std(ddof=1) / math.sqrt(len(values_P))))


def mean_over_tags(values_P: FloatArray, tags: Sequence[str]) -> Interval:
    """Every tag has the same weight: the mean of the tags' means; their errors are independent and add as squares."""
    parts = [interval(values_P[np.array(tags) == tag]) for tag in dict.fromkeys(tags)]
    mean = sum(part.mean for part in parts) / len(parts)
    return Interval(mean, math.sqrt(sum(part.half_width**2 for part in parts)) / len(parts))


def table(scored: Sequence[ScoredPrompt], units: Mapping[str, float]) -> dict[str, Interval]:
    """Column title -> its value. `units`: reward -> factor for its scores."""
    tags = [one.tag for one in scored if one.tag is not None]
    cells = {}
    for title, reward in columns(list(scored[0].scores_G)).items():
        values_P = _prompt_means(scored, reward, units)
        by_tag = title in MEAN_OVER_TAGS and len(tags) == len(scored)
        cells[title] = mean_over_tags(values_P, tags) if by_tag else interval(values_P)
    return cells


def tables_by_tag(scored: Sequence[ScoredPrompt], units: Mapping[str, float]) -> dict[str, dict[str, Interval]]:
    """Tag -> its table; empty when the prompts have no tags."""
    tags = dict.fromkeys(one.tag for one in scored if one.tag is not None)
    return {tag: table([ScoredPrompt(one.scores_G) for one in scored if one.tag == tag], units) for tag in tags}


def markdown_table(corner: str, rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """Rows by name, columns by title."""
    titles = list(next(iter(rows.values())))
    lines = [[corner, *titles], ["---"] * (len(titles) + 1)]
    lines += [[name, *(str(cells[title]) for title in titles)] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prompt_means(scored: Sequence[ScoredPrompt], reward: str, units: Mapping[str, float]) -> FloatArray:
    return np.array([one.scores_G[reward].mean(dtype=np.float64) * units.get(reward, 1.0) for one in scored])
