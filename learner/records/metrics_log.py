"""Metrics of a run: one record per iteration goes to `metrics.jsonl`, the console and Prometheus."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.console_stream import LOG
from common.group_ends import RefusedGroup
from common.kept_groups import GroupPicture, TrainedSamples
from common.types import Collected, Position, Stage, UpdateResult
from common.whole_files import write_whole
from learner.metric_names import DROPPED_GROUPS, GROUP_ERROR, GROUP_MEAN, GROUPS, RENORMALISED_GROUPS, SIGNAL_NORM
from learner.records.console import Console
from learner.records.group_files import write_groups
from learner.records.line_file import LineFile
from learner.records.prometheus import RunMetrics

FAINT = 0.01
"""Of the sum of the terms' gradient norms: below this, a term trains next to nothing."""
KEPT_GROUPS = "kept groups"
"""Names the line, shown once, that groups cannot be kept."""
NOT_EXPORTED = (DROPPED_GROUPS, RENORMALISED_GROUPS, GROUPS, GROUP_ERROR)
"""Metrics without a gauge. Dropped and renormalised groups are counted by cause; only the watchdog needs the errors."""
BEGINNING = Position(Stage.COLD_START, 0)


class StepRecord:
    """The report of one iteration, filled in while it runs."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.images: Mapping[str, int] = {}
        self.dropped: Mapping[str, int] = {}
        self.reasons: Mapping[str, str] = {}
        self.renormalised: Mapping[str, int] = {}
        self.refused: Sequence[RefusedGroup] = ()
        self.idle_shares: Mapping[str, float] = {}
        self.pictures: Mapping[int, GroupPicture] = {}
        self.trained: TrainedSamples | None = None
        self.spreads: Mapping[str, list[float]] = {}
        self.peak_bytes = 0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def record(self, collected: Collected, result: UpdateResult) -> None:
        """Record a stage 2 iteration: the work of the workers and of the learner."""
        self.record_update(result)
        for part, seconds in collected.seconds.items():
            self.seconds[f"worker_{part}"] = seconds
        self.dropped, self.reasons = collected.dropped, collected.reasons
        self.renormalised, self.refused = collected.renormalised, collected.refused
        self.pictures, self.trained = collected.pictures, result.trained
        self.metrics[DROPPED_GROUPS] = float(sum(collected.dropped.values()))
        for cause, count in collected.renormalised.items():
            self.metrics[f"{RENORMALISED_GROUPS}/{cause}"] = float(count)
        self.images, self.spreads = collected.images, collected.spreads
        self.idle_shares = collected.idle_shares()
        self.metrics.update(over_groups(collected.statistics))

    def record_update(self, result: UpdateResult) -> None:
        self.metrics.update(result.metrics)
        for part, seconds in result.seconds.items():
            self.seconds[f"update_{part}"] = seconds
        self.peak_bytes = result.peak_bytes


class Tracker:
    """Writes one line per iteration and per evaluation. On resume, lines after the checkpoint are removed first."""

    def __init__(self, path: Path, console: Console, metrics: RunMetrics) -> None:
        self.lines = LineFile(path)
        self._console = console
        self._metrics = metrics
        self._named: set[str] = set()
        path.touch()

    @contextmanager
    def iteration(self, stage: str, iteration: int) -> Iterator[StepRecord]:
        """Time and record one iteration; nothing is written when it fails."""
        record, started = StepRecord(), time.perf_counter()
        yield record
        record.seconds["step"] = time.perf_counter() - started
        self._keep_groups(Position(Stage(stage), iteration), record)
        self._write(stage, iteration, "train", record.metrics, record.seconds)
        self._metrics.iteration_finished(stage, iteration, record.metrics, record.seconds)
        self._metrics.spreads(record.spreads)
        self._metrics.idle_shares(record.idle_shares)
        self._metrics.learner_memory(record.peak_bytes)
        shown = {_grouped(name): value for name, value in record.metrics.items() if not name.startswith(GROUP_ERROR)}
        shown |= {f"seconds/{part}": value for part, value in record.seconds.items()}
        if record.images:
            shown["speed/images per second"] = sum(record.images.values()) / record.seconds["step"]
        if record.idle_shares:
            shown["speed/idle share of the workers"] = statistics.fmean(record.idle_shares.values())
        self._console.update(shown, stage, iteration)
        self._name_refused(iteration, record)
        self._name_dropped(iteration, record)
        self._name_faint_terms(iteration, record)

    def evaluation(self, position: Position, policy: str, metrics: dict[str, float], seconds: float) -> None:
        """Record an evaluation of the student after `position.iteration` iterations."""
        self._write(position.stage, position.iteration, "evaluation", metrics, {"evaluation": seconds})
        self._metrics.evaluated(policy, metrics, seconds)
        self._console.keep({f"evaluation/{name}": value for name, value in metrics.items()})
        after = f"{policy} after {position.iteration} iterations of {position.stage}"
        self._console.message(f"{after}: {_listed(metrics)}  ({seconds:.0f} s)")

    def policy(self, policy: str, metrics: dict[str, float], seconds: float) -> None:
        """Show a policy of the final comparison (stored by `learner/driver/comparison.py`)."""
        self._metrics.evaluated(policy, metrics, seconds)
        self._console.message(f"{policy}: {_listed(metrics)}  ({seconds:.0f} s)")

    def totals(self) -> dict[str, float]:
        """Seconds by stage or part, summed over the whole run, including earlier sessions of a resumed run."""
        self.lines.settle()
        totals: dict[str, float] = defaultdict(float)
        for line in self.lines.path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            part = "evaluation" if record["kind"] == "evaluation" else record["stage"]
            totals[part] += record["seconds"]["step" if record["kind"] == "train" else "evaluation"]
        return dict(totals)

    def alarm(self, detector: str) -> None:
        """The watchdog has raised an alarm."""
        self._metrics.watchdog_alarm(detector)

    def checkpoint(self, folder: Path) -> None:
        """A checkpoint was written."""
        self._metrics.checkpoint_written(folder)

    def paused(self, paused: bool) -> None:
        """The run is paused on request, or continues."""
        self._metrics.paused(paused)

    def message(self, text: str) -> None:
        self._console.message(text)

    def _write(
        self, stage: str, iteration: int, kind: str, metrics: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        line = {"stage": stage, "iteration": iteration, "kind": kind, "metrics": metrics, "seconds": seconds}
        line["time"] = round(time.time(), 3)
        self.lines.append(json.dumps(line) + "\n")

    def _name_refused(self, iteration: int, record: StepRecord) -> None:
        """One line per fault and worker."""
        for group, count in Counter(record.refused).items():
            groups = "a group" if count == 1 else f"{count} groups"
            self._console.message(
                f"iteration {iteration}: {groups} of worker {group.worker} arrived {group.fault} at the learner: "
                "sampled again, or dropped the second time"
            )

    def _keep_groups(self, position: Position, record: StepRecord) -> None:
        """Write the groups to look at. The run goes on without them: they are no part of its result."""
        if not record.pictures or record.trained is None:
            return
        try:
            write_groups(self.lines.path.parent, position, record.pictures, record.trained)
        except OSError as error:
            if KEPT_GROUPS not in self._named:
                self._named.add(KEPT_GROUPS)
                LOG.warning(f"groups are not kept for the live page: {error}; the run goes on")

    def _name_dropped(self, iteration: int, record: StepRecord) -> None:
        """One line for the first groups that are dropped for a reason; after that they are only counted."""
        for cause in record.reasons.keys() - self._named:
            self._named.add(cause)
            LOG.warning(
                f"{record.dropped[cause]} groups of iteration {iteration} were dropped: {record.reasons[cause]} "
                f"(this line comes once; {self.lines.path.name} counts them as {DROPPED_GROUPS})"
            )

    def _name_faint_terms(self, iteration: int, record: StepRecord) -> None:
        """One line for a term of the student's gradient that is switched on and has next to no part in it."""
        norms = {name: value for name, value in record.metrics.items() if name.startswith(f"{SIGNAL_NORM}/")}
        for name, norm in norms.items():
            if norm < FAINT * sum(norms.values()) and name not in self._named:
                self._named.add(name)
                LOG.warning(
                    f"iteration {iteration}: the term {name.removeprefix(f'{SIGNAL_NORM}/')} is "
                    f"{norm / sum(norms.values()):.2%} of the student's gradient: raise its weight, or switch it off"
                )


def over_groups(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The number of groups; of each statistic, its mean over those that have it, and if two have it, its error."""
    found = {GROUPS: float(len(groups))}
    for name in dict.fromkeys(name for group in groups for name in group):
        values = [group[name] for group in groups if name in group]
        found[f"{GROUP_MEAN}/{name}"] = statistics.fmean(values)
        if len(values) > 1:
            found[f"{GROUP_ERROR}/{name}"] = statistics.stdev(values) / len(values) ** 0.5
    return found


def _listed(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def _grouped(name: str) -> str:
    """The console groups metrics by the part before the slash; a bare name is a loss or a norm."""
    return name if "/" in name else f"loss/{name}"


def cut_metrics(path: Path, position: Position) -> None:
    """Remove the lines of iterations that a resumed run will repeat, and an incomplete last line."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().split(b"\n") if (after := _after(line)) and after <= position]
    write_whole(path, b"".join(line + b"\n" for line in kept))


def logged_until(path: Path) -> Position:
    """The position after the last iteration in a metrics file; the beginning if there is none."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return max((after for line in lines if (after := _after(line))), default=BEGINNING)


def best_evaluation(path: Path, stage: Stage, metric: str, among: Collection[int]) -> tuple[int, float] | None:
    """Of these numbers of iterations, the one whose evaluation has the highest value, and the value; the latest of
    equals. None if none of them was evaluated.
    """
    values: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        mine = (record["kind"], record["stage"]) == ("evaluation", stage) and record["iteration"] in among
        if mine and metric in record["metrics"]:
            values[record["iteration"]] = record["metrics"][metric]
    best = max(values, key=lambda iteration: (values[iteration], iteration), default=None)
    return None if best is None else (best, values[best])


def _after(line: bytes) -> Position | None:
    """The position after what a line tells of; None if the line is damaged."""
    try:
        record = json.loads(line)
        # A train line counts from 0; an evaluation line has the number of iterations before it.
        done = record["iteration"] + 1 if record["kind"] == "train" else record["iteration"]
        return Position(Stage(record["stage"]), done)
    except (ValueError, KeyError, TypeError):
        return None
