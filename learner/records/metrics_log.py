"""Metrics of a run: one record per iteration goes to `metrics.jsonl`, the console and Prometheus."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from common.console_stream import LOG
from common.group_ends import RefusedGroup
from common.types import Collected, GroupPicture, Position, Stage, TrainedSamples, UpdateResult
from common.whole_files import write_whole
from learner.metric_names import (
    DROPPED_GROUPS,
    GROUP_ERROR,
    GROUP_MEAN,
    GROUPS,
    LEFT_OUT_GRADIENTS,
    RENORMALISED_GROUPS,
    SIGNAL_NORM,
)
from learner.records.console import Console
from learner.records.group_files import write_groups
from learner.records.prometheus import DriverMetrics, LearnerMetrics

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
        self.images, self.idle_shares = collected.images, collected.idle_shares()
        self.metrics.update(over_groups(collected.statistics))

    def record_update(self, result: UpdateResult) -> None:
        self.metrics.update(result.metrics)
        for part, seconds in result.seconds.items():
            self.seconds[f"update_{part}"] = seconds


class Tracker:
    """Writes one line per iteration and per evaluation. On resume, lines after the checkpoint are removed first."""

    def __init__(
        self, path: Path, console: Console, driver: DriverMetrics, learner: LearnerMetrics, workers: int
    ) -> None:
        self._path = path
        self._console = console
        self._driver = driver
        self._learner = learner
        self._expected_workers = workers
        self._workers: set[str] = set()
        self._named: set[str] = set()
        self._file: TextIO = path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def iteration(self, stage: str, iteration: int) -> Iterator[StepRecord]:
        """Time and record one iteration; nothing is written when it fails."""
        record, started = StepRecord(), time.perf_counter()
        yield record
        record.seconds["step"] = time.perf_counter() - started
        self._keep_groups(Position(Stage(stage), iteration), record)
        self._write(stage, iteration, "train", record.metrics, record.seconds)
        self._export(stage, iteration, record)
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
        for name, value in metrics.items():
            self._driver.evaluation.labels(policy=policy, metric=name).set(value)
        self._console.keep({f"evaluation/{name}": value for name, value in metrics.items()})
        after = f"{policy} after {position.iteration} iterations of {position.stage}"
        self._console.message(f"{after}: {_listed(metrics)}  ({seconds:.0f} s)")

    def policy(self, policy: str, metrics: dict[str, float], seconds: float) -> None:
        """Show a policy of the final comparison (stored by `learner/driver/comparison.py`)."""
        for name, value in metrics.items():
            self._driver.evaluation.labels(policy=policy, metric=name).set(value)
        self._console.message(f"{policy}: {_listed(metrics)}  ({seconds:.0f} s)")

    def totals(self) -> dict[str, float]:
        """Seconds by stage or part, summed over the whole run, including earlier sessions of a resumed run."""
        totals: dict[str, float] = defaultdict(float)
        for line in self._path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            part = "evaluation" if record["kind"] == "evaluation" else record["stage"]
            totals[part] += record["seconds"]["step" if record["kind"] == "train" else "evaluation"]
        return dict(totals)

    def alarm(self, detector: str) -> None:
        """Count an alarm of the watchdog."""
        self._driver.watchdog_alarms.labels(detector=detector).inc()

    def message(self, text: str) -> None:
        self._console.message(text)

    def _write(
        self, stage: str, iteration: int, kind: str, metrics: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        line = {"stage": stage, "iteration": iteration, "kind": kind, "metrics": metrics, "seconds": seconds}
        line["time"] = round(time.time(), 3)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

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
            write_groups(self._path.parent, position, record.pictures, record.trained)
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
                f"(this line comes once; {self._path.name} counts them as {DROPPED_GROUPS})"
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

    def _export(self, stage: str, iteration: int, record: StepRecord) -> None:
        self._driver.iteration.labels(stage=stage).set(iteration + 1)
        if stage == Stage.ALIGNMENT:
            self._driver.policy_version.set(iteration)
        self._export_workers(record)
        for part, seconds in record.seconds.items():
            self._driver.stage_seconds.labels(part=part).inc(seconds)
        for cause, count in record.dropped.items():
            self._driver.dropped_groups.labels(cause=cause).inc(count)
        for cause, count in record.renormalised.items():
            self._driver.renormalised_groups.labels(cause=cause).inc(count)
        for name, value in record.metrics.items():
            kind, _, rest = name.partition("/")
            if kind == "reward":
                self._driver.reward.labels(reward=rest).set(value)
            elif kind == LEFT_OUT_GRADIENTS:
                self._driver.left_out_gradients.labels(cause=rest).inc(value)
            elif kind not in NOT_EXPORTED:
                self._learner.loss.labels(loss=name).set(value)
        self._learner.updates.labels(network="fake").inc()
        if "student_gradient_norm" in record.metrics:
            self._learner.updates.labels(network="student").inc()

    def _export_workers(self, record: StepRecord) -> None:
        for worker, images in record.images.items():
            if worker not in self._workers and len(self._workers) >= self._expected_workers:
                self._driver.worker_restarts.inc()
            self._workers.add(worker)
            self._driver.images.labels(worker=worker).inc(images)
        self._driver.worker_idle_share.clear()  # without those that are gone
        for worker, share in record.idle_shares.items():
            self._driver.worker_idle_share.labels(worker=worker).set(share)
        for group in record.refused:
            self._driver.refused_groups.labels(fault=group.fault, worker=group.worker).inc()


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


def _after(line: bytes) -> Position | None:
    """The position after what a line tells of; None if the line is damaged."""
    try:
        record = json.loads(line)
        # A train line counts from 0; an evaluation line has the number of iterations before it.
        done = record["iteration"] + 1 if record["kind"] == "train" else record["iteration"]
        return Position(Stage(record["stage"]), done)
    except (ValueError, KeyError, TypeError):
        return None
