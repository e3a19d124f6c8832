"""Reads what a run leaves, for its report, the live page and comparisons. All but metrics.jsonl may be missing.

metrics.jsonl             JSON lines: {"stage", "iteration", "kind": "train" | "evaluation", "metrics", "seconds",
                          "time"}; time is in seconds since 1970, and runs of earlier versions lack it
summary.json              {"policies": {name: {metric: value}}, "seconds": {part: value}, "run": {...}}
samples/gallery.json      [{"prompt", "policies": {name: {"image": file beside it, "scores": {name: value}}}}]
samples/policies/*.json   see `learner/driver/comparison.py`
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RtdmdError

DIVERSITY = "diversity"
POLICY_ORDER = ("cold_start", "rtdmd")
"""Students in the order of a run. Teachers come first."""
TRAIN, EVALUATION = "train", "evaluation"


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. `time` is None in runs of earlier versions."""

    stage: str
    iteration: int
    kind: str
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    time: float | None

    @classmethod
    def parsed(cls, line: bytes) -> Record:
        """Raises ValueError, KeyError, TypeError or AttributeError if the line is not a record."""
        fields = json.loads(line)
        metrics, seconds, time = fields["metrics"], fields.get("seconds", {}), fields.get("time")
        values = [fields["iteration"], *metrics.values(), *seconds.values(), *([] if time is None else [time])]
        if not all(isinstance(value, int | float) for value in values):
            raise TypeError("a value is not a number")
        return cls(str(fields["stage"]), fields["iteration"], str(fields["kind"]), metrics, seconds, time)


class MetricsFile:
    """The records of a metrics.jsonl that may still grow: each call reads only what is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin(inode=0)

    def _begin(self, inode: int) -> None:
        self._inode, self._offset, self._lines = inode, 0, 0
        self._records: dict[tuple[str, int, str], Record] = {}

    def records(self) -> list[Record]:
        """All records, by iteration. If a resumed run wrote an iteration twice, the later one counts.

        Raises:
            RtdmdError: the file is missing, or a line before the last one is damaged.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                # A resumed run replaces the file by a shorter one.
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._begin(status.st_ino)
                file.seek(self._offset)
                self._read(file.read().splitlines(keepends=True))
        except FileNotFoundError as error:
            raise RtdmdError(f"{self._path}: missing: {self._path.parent} is not the directory of a run") from error
        return sorted(self._records.values(), key=lambda record: record.iteration)

    def _read(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            try:
                record = Record.parsed(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if line is lines[-1]:
                    return  # torn, or still being written: the next call reads it again
                raise RtdmdError(f"{self._path}: line {self._lines + 1} is not a metrics record: {error!r}") from error
            self._records[record.stage, record.iteration, record.kind] = record
            if line.endswith(b"\n"):
                self._offset += len(line)
                self._lines += 1


def read_metrics(run_dir: Path) -> list[Record]:
    """The records of a run; see `MetricsFile.records`."""
    return MetricsFile(run_dir / "metrics.jsonl").records()


@dataclass(frozen=True)
class PolicyResult:
    """The evaluation of one policy in the final table.

    Attributes:
        metrics: name -> mean.
        by_prompt: name -> place of a prompt -> the mean over its images. Empty if the run kept no scores by prompt.
        basis: what two policies must share to be compared prompt by prompt: prompts, images per prompt and seed.
    """

    metrics: Mapping[str, float]
    by_prompt: Mapping[str, Mapping[int, float]]
    basis: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """An image of the gallery and its scores by reward."""

    file: Path
    scores: Mapping[str, float]


@dataclass(frozen=True)
class GalleryRow:
    """One prompt of the gallery: policy -> its picture."""

    prompt: str
    pictures: Mapping[str, Picture]


@dataclass(frozen=True)
class RunFiles:
    """A run directory's content, but for the metrics."""

    name: str
    policies: Mapping[str, PolicyResult]
    seconds: Mapping[str, float]
    facts: Mapping[str, str | float]
    gallery: Sequence[GalleryRow]
    config: str
    finished: bool


def read_run(run_dir: Path) -> RunFiles:
    """Read the final table, the gallery and the configuration, or what there is of them.

    Raises:
        RtdmdError: a file is damaged.
    """
    with _damage_named(run_dir / "summary.json") as path:
        summary = _json(path, {})
        metrics = {name: _numbers(values) for name, values in summary.get("policies", {}).items()}
        seconds = _numbers(summary.get("seconds", {}))
        facts = {str(name): value if isinstance(value, float) else str(value) for name, value in _items(summary, "run")}
    policies = _policies(run_dir / "samples" / "policies", metrics)
    with _damage_named(run_dir / "samples" / "gallery.json") as path:
        gallery = [_row(entry, path.parent) for entry in _json(path, [])]
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    return RunFiles(run_dir.resolve().name, policies, seconds, facts, gallery, text, bool(metrics))


def policy_label(name: str) -> str:
    """`teacher_28` -> "Teacher, 28 steps"; other names lose their underscores."""
    teacher = re.fullmatch(r"teacher_(\d+)", name)
    if teacher:
        return f"Teacher, {teacher[1]} steps"
    return {"rtdmd": "RTDMD", "cold_start": "Cold start"}.get(name, name.replace("_", " "))


def _policies(directory: Path, summary: Mapping[str, Mapping[str, float]]) -> dict[str, PolicyResult]:
    """Those of the summary; without one those that were evaluated so far, teachers first."""
    names = list(summary) or sorted((path.stem for path in directory.glob("*.json")), key=_place)
    policies = {}
    for name in names:
        with _damage_named(directory / f"{name}.json") as path:
            kept = _json(path, {})
            metrics = summary.get(name) or _numbers(kept["metrics"])
            basis = kept.get("basis", {})
            shared = tuple(str(basis.get(key)) for key in ("prompts_fingerprint", "images_per_prompt", "seed"))
            policies[name] = PolicyResult(metrics, _by_prompt(kept), shared)
    return policies


def _place(name: str) -> tuple[int, int]:
    """Teachers by falling number of steps, then the students."""
    teacher = re.fullmatch(r"teacher_(\d+)", name)
    if teacher:
        return -1, -int(teacher[1])
    return (POLICY_ORDER.index(name) if name in POLICY_ORDER else len(POLICY_ORDER)), 0


def _by_prompt(kept: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    means: dict[str, dict[int, float]] = {}
    for place, scores in enumerate(kept.get("scores", [])):
        for reward, values in scores.items():
            means.setdefault(reward, {})[place] = sum(values) / len(values)
    diversity = dict(enumerate(float(value) for value in kept.get(DIVERSITY, [])))
    return means | ({DIVERSITY: diversity} if diversity else {})


def _row(entry: Mapping[str, Any], directory: Path) -> GalleryRow:
    pictures = {
        name: Picture(directory / picture["image"], _numbers(picture["scores"]))
        for name, picture in entry["policies"].items()
    }
    return GalleryRow(str(entry["prompt"]), pictures)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    if not all(isinstance(value, int | float) for value in values.values()):
        raise TypeError("a value is not a number")
    return dict(values)


def _items(summary: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    return list(summary.get(key, {}).items())


@contextmanager
def _damage_named(path: Path) -> Iterator[Path]:
    """RtdmdError if a file's content is not what a run writes."""
    try:
        yield path
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise RtdmdError(
            f"{path}: not what a run writes ({error!r}): restore it, or remove it to report without"
        ) from error


def _json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return otherwise
