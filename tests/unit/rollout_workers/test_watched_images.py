"""Hacked images of the shapes world that the gold checker accepts: the watchdog's detectors see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.types import Position, Stage
from learner.driver.watchdog import Watchdog, Watched
from learner.records.metrics_log import over_groups
from rollout_workers.image_statistics import image_statistics
from zoo.world.scenes import CANVAS, render_scenes, sample_scenes

Pixels = npt.NDArray[np.float64]
WATCHED = Watched(("hps",), ("gold",), "gold", iterations=100, evaluations=4, false_alarm_rate=0.01)
GROUPS, SAMPLES, ITERATIONS, CLEAN = 8, 4, 6, 4
COLUMN, ROW = np.arange(CANVAS)[None, :, None], np.arange(CANVAS)[:, None, None]


def clean(pixels: Pixels) -> Pixels:
    return pixels


def saturated(pixels: Pixels) -> Pixels:
    """Colours four times as far from grey."""
    grey = pixels.mean(-1, keepdims=True)
    return grey + 4 * (pixels - grey)


def waves(pixels: Pixels) -> Pixels:
    """A faint grid: 2 % amplitude, a period of 4 pixels."""
    return pixels + 0.02 * np.sin(np.pi / 2 * COLUMN + 0.7)


def checkers(pixels: Pixels) -> Pixels:
    """A faint checkerboard with fields of 4 pixels."""
    return pixels + 0.02 * np.where((COLUMN // 4 + ROW // 4) % 2 == 0, 1, -1)


def noisy(pixels: Pixels) -> Pixels:
    """Noise without any period."""
    return pixels + np.random.default_rng(0).normal(0, 0.08, pixels.shape)


def collapsed(pixels: Pixels) -> Pixels:
    """All images of a group are the first one."""
    return np.broadcast_to(pixels[:1], pixels.shape)


@pytest.mark.parametrize(
    ("damage", "detectors"),
    [
        (clean, set()),
        (saturated, {"clipping"}),
        (waves, {"grid"}),
        (checkers, {"grid"}),
        (noisy, {"sharpness"}),
        (collapsed, {"duplicates", "difference"}),
    ],
)
def test_damage_is_seen_within_two_iterations(
    damage: Callable[[Pixels], Pixels], detectors: set[str], tmp_path: Path
) -> None:
    """Four iterations of clean images, then two of damaged ones; every group has scenes of its own."""
    watchdog, raised = Watchdog(WATCHED, tmp_path), set()
    for iteration in range(ITERATIONS):
        groups = []
        for group in range(GROUPS):
            seed = iteration * GROUPS + group
            pixels = render_scenes(sample_scenes(SAMPLES, seed), seed) / 255
            changed = damage(pixels) if iteration >= CLEAN else pixels
            images = (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)
            groups.append(image_statistics(torch.from_numpy(images)))
        line = {"stage": Stage.ALIGNMENT, "iteration": iteration, "kind": "train", "metrics": over_groups(groups)}
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        raised |= {alarm.detector for alarm in watchdog.look(Position(Stage.ALIGNMENT, iteration + 1))}
    assert detectors <= raised
    assert bool(detectors) == bool(raised)
