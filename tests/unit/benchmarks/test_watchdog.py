"""The watchdog's runs: every one is possible, the kept ones are caught or clean, and the tables say so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.watchdog.arms import WATCHED
from benchmarks.watchdog.grid_scorer import GridScorer
from benchmarks.watchdog.replay import Replay, replayed, replayed_claim
from benchmarks.watchdog.tables import CLAIMS_RESULTS, clean_line, hack_table
from learner.driver.drift_statistics import Estimate
from learner.driver.watchdog import Alarm
from learner.preflight.command_line import parse


@pytest.mark.parametrize("name", WATCHED)
def test_every_arm_is_a_possible_run(name: str) -> None:
    watched = WATCHED[name]
    words = [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in watched.all_options.items()
    ]
    config = parse(["--config", watched.config, *words], {}).config
    assert {reward.name for reward in config.rewards if reward.trained} == {*watched.trained}
    assert config.evaluation.every == 3


def test_the_grid_scorer_has_the_gradient_of_its_score() -> None:
    scorer, images = GridScorer(), np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    scores, gradients = scorer.score_with_gradient(images, ["", ""], [{}, {}])
    change = np.zeros_like(images)
    change[1, 2, 4, 8] = 0.5
    moved = scorer.score_with_gradient(images + change, ["", ""], [{}, {}])[0]
    assert moved[0] == pytest.approx(scores[0])
    assert moved[1] - scores[1] == pytest.approx(0.5 * gradients[1, 2, 4, 8], rel=1e-3)
    wave = 0.01 * np.cos(np.pi / 2 * np.arange(16))
    pattern = np.broadcast_to(0.5 + wave[:, None] + wave, (1, 3, 16, 16)).astype(np.float32)
    assert scorer.score_with_gradient(pattern, [""], [{}])[0] == pytest.approx([1.0], rel=1e-3)


def run_of(gold: dict[int, float], grid: float) -> dict[str, Any]:
    """A run of 8 iterations in which a grid appears after 4; `gold` by iteration, for 30 prompts."""
    iterations = []
    for index in range(8):
        metrics = {"groups": 8.0, "group_mean/grid": 0.5 + grid * (index >= 4), "group_error/grid": 0.05}
        iterations.append({"stage": "alignment", "iteration": index, "kind": "train", "metrics": metrics})
    evaluations = []
    for done, share in gold.items():
        values = {"gold": [1.0 if place < 30 * share else 0.0 for place in range(30)]}
        values |= {"hps": [0.1] * 30, "diversity": [0.3] * 30, "agreement": [0.0] * 30}
        line = {"stage": "alignment", "iteration": done, "kind": "evaluation", "basis": "x", "values": values}
        evaluations.append(line)
    return {"iterations": iterations, "evaluations": evaluations}


def test_a_run_is_replayed_in_order() -> None:
    replay = replayed(run_of({0: 1.0, 4: 0.9, 8: 0.1}, grid=2.0), ["hps"])
    assert [(alarm.detector, alarm.iteration) for alarm in replay.alarms] == [("grid", 5), ("evaluation_gold", 8)]
    assert replay.gold_at(4).mean == pytest.approx(-0.1)
    assert replay.gold_at(6).mean == pytest.approx(-0.9)
    assert (replay.gold_lost(0.05), replay.gold_lost(0.5), replay.gold_lost(0.95)) == (4, 8, None)
    assert replayed(run_of({0: 0.5, 4: 0.5, 8: 0.6}, grid=0.0), ["hps"]).alarms == []


def test_a_claims_run_is_its_table_against_that_of_its_start() -> None:
    """Of the kept runs: back-propagation alone hacks its reward, all three terms together do not."""
    for arm, expected in (("back_propagation", ["evaluation_gold"]), ("all", [])):
        result = json.loads((CLAIMS_RESULTS / f"C/{arm}-0.json").read_text())
        replay = replayed_claim(result, ("detector", "hps"))
        assert [alarm.detector for alarm in replay.alarms] == expected
        assert (replay.gold_at(40).mean < 0) == bool(expected)


def test_the_tables_by_hand() -> None:
    gold = {0: Estimate(0.0, 0.0, 9), 2: Estimate(-0.02, 0.01, 9), 4: Estimate(-0.3, 0.02, 9)}
    caught = Replay([Alarm("grid", 1, ""), Alarm("evaluation_gold", 4, "")], gold)
    quiet = Replay([], gold)
    assert hack_table({"a": caught, "b": quiet}).splitlines()[2:] == [
        "| a | grid | 1 | -0.020 ± 0.010 | 4 | grid (1), evaluation_gold (4) |",
        "| b | none | | | 4 | |",
    ]
    expected = "clean runs: 2, with an alarm: none; so at most 1.50 of such runs raise one, with 95 % confidence"
    assert clean_line({"b": quiet, "c": quiet}) == expected
    assert clean_line({"a": caught, "b": quiet}) == "clean runs: 2, with an alarm: a: grid"
