"""Replays what is kept of a run through today's watchdog, iteration by iteration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from common.types import EvaluatedPrompt, Position, Prompt, Stage
from learner.driver.drift_statistics import Estimate, paired_change
from learner.driver.watchdog import DETECTORS, DIVERSITY, Alarm, Watchdog, Watched

Result = Mapping[str, Any]
"""The content of a result file of this benchmark, or of `benchmarks/claims`."""
FALSE_ALARM_RATE = 0.01
STATISTICS = tuple(detector.name for detector in DETECTORS)
GOLD = "gold"


@dataclass(frozen=True)
class Replay:
    """The alarms of a run, and gold's change since the start by the number of iterations."""

    alarms: list[Alarm]
    gold: Mapping[int, Estimate]

    @property
    def first(self) -> Alarm | None:
        return self.alarms[0] if self.alarms else None

    def gold_at(self, iteration: int) -> Estimate:
        """Gold's change at the first evaluation that is not before `iteration`."""
        return self.gold[min(found for found in self.gold if found >= iteration)]

    def gold_lost(self, limit: float) -> int | None:
        """The first evaluation at which gold was lower by `limit` or more; None if it never was."""
        return next((found for found, change in sorted(self.gold.items()) if change.mean <= -limit), None)


def replayed(result: Result, trained: Sequence[str]) -> Replay:
    """Replay a run of this benchmark."""
    iterations, evaluations = result["iterations"], result["evaluations"]
    values = {line["iteration"]: line["values"] for line in evaluations}
    held_out = [name for name in values[0] if name not in (*trained, DIVERSITY, *STATISTICS)]
    watched = Watched(tuple(trained), tuple(held_out), GOLD, len(iterations), len(evaluations) - 1, FALSE_ALARM_RATE)
    alarms: list[Alarm] = []
    with TemporaryDirectory() as folder:
        for done in range(len(iterations) + 1):
            _append(Path(folder) / "metrics.jsonl", [iterations[done - 1]] if done > 0 else [])
            _append(Path(folder) / "watchdog.jsonl", [line for line in evaluations if line["iteration"] == done])
            alarms += Watchdog(watched, Path(folder)).look(Position(Stage.ALIGNMENT, done))
    changes = {done: paired_change(found[GOLD], values[0][GOLD]) for done, found in values.items()}
    return Replay(alarms, {done: change for done, change in changes.items() if change is not None})


def replayed_claim(result: Result, trained: Sequence[str]) -> Replay:
    """Replay a run of `benchmarks/claims`: its final table, paired with the table of its start."""
    policies, length = result["policies"], int(result["options"]["alignment.iterations"])
    names = list(policies["rtdmd"]["scores"][0])
    held_out = tuple(name for name in names if name not in trained)
    looks = length // int(result["options"]["evaluation.every"])
    with TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").touch()
        watchdog = Watchdog(Watched(tuple(trained), held_out, GOLD, length, looks, FALSE_ALARM_RATE), Path(folder))
        for policy, done in (("cold_start", 0), ("rtdmd", length)):
            watchdog.add(Position(Stage.ALIGNMENT, done), _prompts(policies[policy]))
        alarms = watchdog.look(Position(Stage.ALIGNMENT, length))
    gold = [[float(np.mean(row[GOLD])) for row in policies[name]["scores"]] for name in ("rtdmd", "cold_start")]
    return Replay(alarms, {length: Estimate.of([now - start for now, start in zip(*gold, strict=True)])})


def _prompts(policy: Mapping[str, Any]) -> list[EvaluatedPrompt]:
    """A final table's prompts with their scores; only the number of their images is known."""
    prompts = []
    for place, (row, diversity) in enumerate(zip(policy["scores"], policy["diversity"], strict=True)):
        scores = {name: np.array(values, dtype=np.float32) for name, values in row.items()}
        images = np.zeros((len(next(iter(scores.values()))), 1, 1, 3), dtype=np.uint8)
        prompts.append(EvaluatedPrompt(Prompt(place, str(place)), images, scores, diversity))
    return prompts


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
