"""The watchdog on made-up metrics: what raises an alarm, what does not, and what a resumed run knows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config.run import Config
from common.types import EvaluatedPrompt, Position, Prompt, Stage
from learner.driver.watchdog import Watchdog, Watched
from learner.records.metrics_log import cut_metrics

GROUPS = 8
PROMPTS = 60
USUAL = {
    "sharpness": -4.5,
    "saturation": -3.0,
    "clipping": 0.01,
    "grid": 0.5,
    "duplicates": 0.0,
    "difference": -2.0,
    "agreement": 0.4,
}
Drift = Mapping[str, Callable[[int], float]]


WATCHED = Watched(("hps",), ("gold",), "gold", iterations=40, evaluations=4, false_alarm_rate=0.01)


def at(iteration: int) -> Position:
    return Position(Stage.ALIGNMENT, iteration)


def iteration_line(iteration: int, drift: Drift, draw: random.Random) -> str:
    metrics = {"groups": float(GROUPS)}
    for name, usual in USUAL.items():
        moved = drift[name](iteration) if name in drift else 0.0
        metrics[f"group_mean/{name}"] = usual + moved + draw.gauss(0, 0.05)
        metrics[f"group_error/{name}"] = 0.05
    return json.dumps({"stage": "alignment", "iteration": iteration, "kind": "train", "metrics": metrics}) + "\n"


def evaluation(
    gold: float, diversity: float = 0.3, *, agree: bool = True, grid: float = 0.5, draw: random.Random
) -> list[EvaluatedPrompt]:
    """Each prompt has two images; `gold` is the chance that they pass."""
    prompts = []
    for index in range(PROMPTS):
        passed = np.sort([draw.random() < gold for _ in range(2)]).astype(np.float32)
        hps = np.array([0.1, 0.2] if agree else [0.2, 0.1], dtype=np.float32)
        images = np.zeros((2, 1, 1, 3), dtype=np.uint8)
        rewards, statistics = {"hps": hps, "gold": passed}, {"grid": grid + draw.gauss(0, 0.1)}
        prompts.append(EvaluatedPrompt(Prompt(index, f"{index}"), images, rewards, diversity, statistics))
    return prompts


def raised(watchdog: Watchdog, run_dir: Path, drift: Drift, iterations: int, seed: int = 0) -> dict[str, int]:
    """The iteration of each detector's alarm."""
    draw, alarms = random.Random(seed), {}
    for iteration in range(iterations):
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(iteration_line(iteration, drift, draw))
        alarms.update({alarm.detector: alarm.iteration for alarm in watchdog.look(at(iteration + 1))})
    return alarms


def test_the_rate_of_false_alarms_is_shared_by_all_tests_of_a_run() -> None:
    """9 tests of statistics per iteration and per evaluation, and 2 more per evaluation: gold and diversity."""
    sections: dict[str, Any] = {
        "run": {"name": "test"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "rewards": [
            {"name": "hps", "url": "http://x", "differentiable": True},
            {"name": "unused", "url": "http://z", "weight": 0},
            {"name": "gold", "url": "http://y", "weight": 0, "evaluation_only": True},
        ],
        "alignment": {"iterations": 40},
        "evaluation": {"every": 10},
    }
    found = Watched.of(Config.model_validate(sections))
    assert found == WATCHED
    assert found.group_level * 40 * 9 + found.evaluation_level * 4 * 11 == pytest.approx(0.01)


def test_noise_raises_nothing(tmp_path: Path) -> None:
    found = []
    for seed in range(20):
        run_dir = tmp_path / str(seed)
        run_dir.mkdir()
        found += raised(Watchdog(WATCHED, run_dir), run_dir, {}, 40, seed)
    assert found == []


def test_a_drift_within_its_tolerance_raises_nothing(tmp_path: Path) -> None:
    slow: Drift = {"sharpness": lambda i: i / 50, "grid": lambda i: i / 100}
    assert raised(Watchdog(WATCHED, tmp_path), tmp_path, slow, 40) == {}


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("sharpness", 1.0),
        ("sharpness", -1.0),
        ("saturation", 0.5),
        ("saturation", -1.0),
        ("clipping", 0.05),
        ("grid", 0.5),
        ("duplicates", 0.1),
        ("difference", -1.0),
        ("agreement", -0.3),
    ],
)
def test_a_drift_beyond_its_tolerance_raises_one_alarm(name: str, limit: float, tmp_path: Path) -> None:
    """The drift begins after iteration 4, and is twice the limit and six times the noise more."""
    beyond = 2 * limit + (0.3 if limit > 0 else -0.3)
    found = raised(Watchdog(WATCHED, tmp_path), tmp_path, {name: lambda i: beyond if i >= 4 else 0.0}, 12)
    assert list(found) == [name]
    assert 5 <= found[name] <= 6


def test_an_alarm_says_what_has_happened(tmp_path: Path) -> None:
    lines = [iteration_line(i, {"grid": lambda i: 2.0 * (i > 1)}, random.Random(i)) for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (alarm,) = Watchdog(WATCHED, tmp_path).look(at(4))
    assert alarm.message.startswith("a periodic pattern appears in the images: group_mean/grid is 2.")
    assert "at the start of the stage it was 0." in alarm.message


def test_a_single_group_and_an_earlier_version_raise_nothing(tmp_path: Path) -> None:
    """Without an error there is no test; lines without statistics do not count as the start."""
    plain = json.dumps({"stage": "alignment", "iteration": 0, "kind": "train", "metrics": {"loss": 1.0}}) + "\n"
    mean = {"groups": 1.0, "group_mean/grid": 5.0}
    single = json.dumps({"stage": "alignment", "iteration": 1, "kind": "train", "metrics": mean}) + "\n"
    usual = [iteration_line(i, {"grid": lambda i: 2.0 * (i > 3)}, random.Random(i)) for i in range(2, 6)]
    (tmp_path / "metrics.jsonl").write_text(4 * plain + 4 * single + "".join(usual))
    assert [alarm.detector for alarm in Watchdog(WATCHED, tmp_path).look(at(6))] == ["grid"]


def test_other_stages_are_not_watched(tmp_path: Path) -> None:
    watchdog = Watchdog(WATCHED, tmp_path)
    watchdog.add(Position(Stage.COLD_START, 10), evaluation(1.0, draw=random.Random(0)))
    assert watchdog.look(Position(Stage.COLD_START, 10)) == []
    assert not (tmp_path / "watchdog.jsonl").exists()


@pytest.mark.parametrize(
    ("later", "detectors"),
    [
        ({"gold": 0.9}, []),
        ({"gold": 0.3}, ["evaluation_gold"]),
        ({"gold": 0.9, "grid": 0.8}, []),
        ({"gold": 0.9, "grid": 1.2}, ["evaluation_grid"]),
        ({"gold": 0.9, "diversity": 0.2}, []),
        ({"gold": 0.9, "diversity": 0.15}, ["evaluation_diversity"]),
        ({"gold": 0.5, "agree": False}, ["evaluation_gold", "evaluation_agreement"]),
    ],
)
def test_evaluations_are_compared_with_the_first(
    later: Mapping[str, Any], detectors: list[str], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    watchdog, draw = Watchdog(WATCHED, tmp_path), random.Random(3)
    alarms = []
    for iteration, changes in ((0, {"gold": 0.9}), (10, {"gold": 0.9}), (20, later), (30, later)):
        watchdog.add(at(iteration), evaluation(**changes, draw=draw))
        alarms += watchdog.look(at(iteration))
    assert [alarm.detector for alarm in alarms] == detectors
    assert all(alarm.iteration == 20 for alarm in alarms)
    assert all("the trained rewards changed by hps +0.0000 ± 0.0000" in alarm.message for alarm in alarms)


def test_other_prompts_begin_a_new_comparison(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    watchdog, draw = Watchdog(WATCHED, tmp_path), random.Random(0)
    watchdog.add(at(10), evaluation(1.0, draw=draw))
    watchdog.add(at(20), evaluation(0.1, draw=draw)[:12])
    assert watchdog.look(at(20)) == []
    assert watchdog.best([10, 20]) is not None
    assert watchdog.best([10]) is None


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Alarms before the checkpoint are not repeated, those after it are."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    drift: Drift = {"grid": lambda i: 2.0 * (i >= 6), "clipping": lambda i: 1.0 * (i >= 16)}
    draw = random.Random(1)
    for run_dir in (whole, cut):
        run_dir.mkdir()
        watchdog = Watchdog(WATCHED, run_dir)
        watchdog.add(at(0), evaluation(0.9, draw=random.Random(2)))
        assert list(raised(watchdog, run_dir, drift, 20)) == ["grid", "clipping"]
    for name in ("metrics.jsonl", "watchdog.jsonl"):
        cut_metrics(cut / name, at(10))
    resumed, lines = Watchdog(WATCHED, cut), (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    found = []
    for iteration in range(10, 20):
        with (cut / "metrics.jsonl").open("a") as file:
            file.write(lines[iteration])
        found += resumed.look(at(iteration + 1))
    assert [alarm.detector for alarm in found] == ["clipping"]
    assert (cut / "watchdog.jsonl").read_text() == (whole / "watchdog.jsonl").read_text()
    later = evaluation(0.2, draw=draw)
    for watchdog in (resumed, Watchdog(WATCHED, whole)):
        watchdog.add(at(20), later)
        assert [alarm.detector for alarm in watchdog.look(at(20))] == ["evaluation_gold"]


def test_the_best_is_the_latest_of_equals_among_those_asked_for(tmp_path: Path) -> None:
    watchdog = Watchdog(WATCHED, tmp_path)
    for iteration, gold in ((0, 0.0), (10, 1.0), (20, 1.0), (30, 0.0)):
        watchdog.add(at(iteration), evaluation(gold, draw=random.Random(0)))
    assert watchdog.best([0, 10, 20, 30, 40]) == (20, 1.0)
    assert watchdog.best([0, 30]) == (30, 0.0)
    assert watchdog.best([40]) is None


def test_a_reward_that_failed_is_left_out_of_the_pairs(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    watchdog = Watchdog(WATCHED, tmp_path)
    prompts = evaluation(1.0, draw=random.Random(0))
    del prompts[0].rewards_G["gold"]
    watchdog.add(at(0), evaluation(1.0, draw=random.Random(0)))
    watchdog.add(at(10), prompts)
    assert watchdog.look(at(10)) == []
    (_, line) = (tmp_path / "watchdog.jsonl").read_text().splitlines()
    values = json.loads(line)["values"]
    assert values["gold"] == [None] + [1.0] * (PROMPTS - 1)
    assert values["agreement"][0] is None
