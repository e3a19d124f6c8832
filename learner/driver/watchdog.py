"""Watchdog: looks for reward hacking in stage 2, after every iteration and every evaluation.

    groups        statistics of the iteration's groups (metrics.jsonl), the newest against the first of the stage
    evaluations   the same statistics, held-out rewards and diversity, paired by prompt with the stage's start

A detector raises an alarm when its figure has moved beyond its tolerance, by a test whose false alarms are bounded
over the whole run: `watchdog.false_alarm_rate` is divided by the number of tests that the run will make (Bonferroni).
All that the watchdog knows is in the run's directory, so a resumed run goes on as if it had not been interrupted.
`watchdog.jsonl` has two kinds of lines:

    {"stage", "iteration", "kind": "evaluation", "basis": prompts and images per prompt,
     "values": {name: [one value per prompt, null if it is missing]}}
    {"stage", "iteration", "kind": "alarm", "detector", "message"}
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from common.config.run import Config
from common.prompts import prompts_fingerprint
from common.rank_agreement import AGREEMENT, rank_agreement
from common.types import EvaluatedPrompt, Position, Stage
from learner.driver.drift_statistics import Estimate, chance_of_fall, chance_of_rise, paired_change
from learner.metric_names import GROUP_ERROR, GROUP_MEAN, GROUPS
from learner.records.line_file import LineFile

DIVERSITY = "diversity"
WATCHDOG_FILE = "watchdog.jsonl"
WINDOW = 2
"""Iterations that are averaged: the first ones of the stage, and the newest ones."""
KEPT_DIVERSITY = 0.6
"""Share of the start's diversity that a student may fall to."""
DIGITS = 6
Values = Mapping[str, Sequence[float | None]]
"""Of an evaluation: one value per prompt; None where a reward could not score it."""


@dataclass(frozen=True)
class Detector:
    """A statistic of images whose drift is watched, in the groups and in the evaluations.

    Attributes:
        rises, falls: the drift that is tolerated in either direction; None if that direction is never an alarm.
        meaning: what the drift says of the images.
    """

    name: str
    meaning: str
    rises: float | None = None
    falls: float | None = None

    def chances(self, change: Estimate) -> list[float]:
        """For each watched direction: the largest probability of this change if the true one is tolerable."""
        rises = [] if self.rises is None else [chance_of_rise(change, self.rises)]
        falls = [] if self.falls is None else [chance_of_fall(change, self.falls)]
        return rises + falls


DETECTORS = (
    Detector("sharpness", "the images become sharper or blurred", rises=1.0, falls=1.0),
    Detector("saturation", "the colours become stronger or fade", rises=0.5, falls=1.0),
    Detector("clipping", "more pixels are black, white or a pure colour", rises=0.05),
    Detector("grid", "a periodic pattern appears in the images", rises=0.5),
    Detector("duplicates", "images of one prompt are the same", rises=0.1),
    Detector("difference", "the images of a prompt become alike", falls=1.0),
    Detector(AGREEMENT, "the rewards disagree on which image of a prompt is better", falls=0.3),
)
"""Tolerances are in the statistics' own units, see `rollout_workers/image_statistics.py`: 1 is a factor of 2 or 10."""
TESTS = sum((one.rises is not None) + (one.falls is not None) for one in DETECTORS)


@dataclass(frozen=True)
class Alarm:
    """One alarm of a detector, after so many iterations of stage 2."""

    detector: str
    iteration: int
    message: str


@dataclass(frozen=True)
class Watched:
    """Rewards and length of the run that the watchdog watches.

    Attributes:
        gold: the held-out reward that tells which checkpoint is best, if any.
        iterations, evaluations: their numbers in the whole stage.
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    gold: str | None
    iterations: int
    evaluations: int
    false_alarm_rate: float

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(
            trained=tuple(reward.name for reward in config.rewards if reward.trained),
            held_out=tuple(reward.name for reward in config.rewards if reward.evaluation_only),
            gold=config.watchdog.gold_of(config.rewards),
            iterations=config.alignment.iterations,
            evaluations=config.alignment.iterations // config.evaluation.every,
            false_alarm_rate=config.watchdog.false_alarm_rate,
        )

    @property
    def group_level(self) -> float:
        """Probability at which one test of the groups raises an alarm; all of them have half of the rate."""
        return self.false_alarm_rate / 2 / max(1, self.iterations * TESTS)

    @property
    def evaluation_level(self) -> float:
        """Probability at which one test of an evaluation raises an alarm; all of them have the other half."""
        return self.false_alarm_rate / 2 / max(1, self.evaluations * (TESTS + len(self.held_out) + 1))


class Watchdog:
    """The detectors of a run."""

    def __init__(self, watched: Watched, run_dir: Path) -> None:
        self._watched = watched
        self._metrics = run_dir / "metrics.jsonl"
        self.lines = LineFile(run_dir / WATCHDOG_FILE)
        self._read_until = 0
        self._groups: list[Mapping[str, float]] = []
        self._evaluations: dict[int, Values] = {}
        self._basis = ""
        self._raised: set[str] = set()
        written = self.lines.path
        for line in written.read_text(encoding="utf-8").splitlines() if written.exists() else []:
            self._remember(json.loads(line))

    def add(self, position: Position, prompts: Sequence[EvaluatedPrompt]) -> None:
        """Take note of an evaluation of stage 2."""
        if position.stage is Stage.ALIGNMENT:
            basis = f"{prompts_fingerprint([item.prompt for item in prompts])} x {len(prompts[0].images_GHWC)}"
            self._write(position.iteration, "evaluation", {"basis": basis, "values": self._values(prompts)})

    def look(self, position: Position) -> list[Alarm]:
        """The alarms of detectors that had not raised one before; they are written down."""
        if position.stage is not Stage.ALIGNMENT:
            return []
        self._read_groups()
        found = self._drifted(position.iteration)
        if position.iteration in self._evaluations:
            found += self._changed(position.iteration)
        new = [alarm for alarm in found if alarm.detector not in self._raised]
        for alarm in new:
            self._write(alarm.iteration, "alarm", {"detector": alarm.detector, "message": alarm.message})
        return new

    def best(self, iterations: Collection[int]) -> tuple[int, float] | None:
        """Of these numbers of iterations, the one with the best held-out reward, and its mean; the latest of equals.

        None if none of them was evaluated, or no reward is held out.
        """
        means: dict[int, float] = {}
        for iteration in self._evaluations.keys() & set(iterations):
            values = self._evaluations[iteration].get(self._watched.gold or "", [])
            if present := [value for value in values if value is not None]:
                means[iteration] = statistics.fmean(present)
        best = max(means, key=lambda iteration: (means[iteration], iteration), default=None)
        return None if best is None else (best, means[best])

    def _values(self, prompts: Sequence[EvaluatedPrompt]) -> dict[str, list[float | None]]:
        """Per prompt: each reward's mean, diversity, statistics, and how trained rewards agree with held-out ones."""
        values: dict[str, list[float | None]] = {}
        for name in (*self._watched.trained, *self._watched.held_out):
            scores = [item.rewards_G.get(name) for item in prompts]
            values[name] = [None if one is None else round(float(one.mean()), DIGITS) for one in scores]
        values[DIVERSITY] = [round(item.diversity, DIGITS) for item in prompts]
        for name in dict.fromkeys(name for item in prompts for name in item.statistics):
            values[name] = [item.statistics.get(name) for item in prompts]
        values[AGREEMENT] = [self._agreement(item) for item in prompts]
        return values

    def _agreement(self, item: EvaluatedPrompt) -> float | None:
        trained, held_out = (
            [item.rewards_G[name] for name in names if name in item.rewards_G]
            for names in (self._watched.trained, self._watched.held_out)
        )
        return rank_agreement(list(itertools.product(trained, held_out)))

    def _drifted(self, iteration: int) -> list[Alarm]:
        """Alarms of the groups of the newest iterations."""
        if len(self._groups) < 2 * WINDOW:
            return []
        alarms = []
        for detector in DETECTORS:
            start, now = (self._window(part, detector.name) for part in (slice(WINDOW), slice(-WINDOW, None)))
            if start is None or now is None:
                continue
            change = now.minus(start)
            if min(detector.chances(change)) < self._watched.group_level:
                message = f"{detector.meaning}: {GROUP_MEAN}/{detector.name} is {_told(now.mean, change, start.mean)}"
                alarms.append(Alarm(detector.name, iteration, message))
        return alarms

    def _window(self, part: slice, name: str) -> Estimate | None:
        """Mean of a statistic over a few iterations; None if one of them lacks it or its error."""
        mean, error = f"{GROUP_MEAN}/{name}", f"{GROUP_ERROR}/{name}"
        chosen = [metrics for metrics in self._groups[part] if error in metrics]
        if len(chosen) < WINDOW:
            return None
        return Estimate.joined([Estimate(one[mean], one[error], one[GROUPS] - 1) for one in chosen])

    def _changed(self, iteration: int) -> list[Alarm]:
        """Alarms of an evaluation, against the first one of the stage."""
        start, now = self._evaluations[min(self._evaluations)], self._evaluations[iteration]
        chances: dict[str, float] = {}
        for name in self._watched.held_out:
            if change := paired_change(now[name], start[name]):
                chances[name] = chance_of_fall(change)
        if kept := paired_change(now[DIVERSITY], start[DIVERSITY], KEPT_DIVERSITY):
            chances[DIVERSITY] = chance_of_fall(kept)
        for detector in DETECTORS:
            if detector.name in now and (change := paired_change(now[detector.name], start[detector.name])):
                chances[detector.name] = min(detector.chances(change))
        alarms = []
        for name, chance in chances.items():
            change = paired_change(now[name], start[name])
            if change is not None and chance < self._watched.evaluation_level:
                before = statistics.fmean(value for value in start[name] if value is not None)
                told = f"the evaluation's {name} is {_told(before + change.mean, change, before)}"
                alarms.append(Alarm(f"evaluation_{name}", iteration, f"{told}; {self._trained_change(start, now)}"))
        return alarms

    def _trained_change(self, start: Values, now: Values) -> str:
        changes = {name: paired_change(now[name], start[name]) for name in self._watched.trained}
        told = [f"{name} {change.mean:+.4f} ± {change.error:.4f}" for name, change in changes.items() if change]
        return f"the trained rewards changed by {', '.join(told)}"

    def _read_groups(self) -> None:
        """Read what metrics.jsonl has got since the last look."""
        with self._metrics.open("rb") as file:
            file.seek(self._read_until)
            lines = file.readlines()
            self._read_until = file.tell()
        for line in lines:
            record = json.loads(line)
            # An earlier version wrote no statistics of the groups.
            if any(name.startswith(GROUP_ERROR) for name in record["metrics"]):
                self._groups.append(record["metrics"])

    def _write(self, iteration: int, kind: str, content: Mapping[str, Any]) -> None:
        record = {"stage": Stage.ALIGNMENT, "iteration": iteration, "kind": kind, **content}
        self.lines.append(json.dumps(record) + "\n")
        self._remember(record)

    def _remember(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "alarm":
            self._raised.add(record["detector"])
            return
        if record["basis"] != self._basis:
            # Other prompts, or another number of images: a resumed run may have changed them.
            self._basis, self._evaluations = record["basis"], {}
        self._evaluations[record["iteration"]] = record["values"]


def _told(now: float, change: Estimate, start: float) -> str:
    return f"{now:.3f}, at the start of the stage it was {start:.3f} (change {change.mean:+.3f} ± {change.error:.3f})"
