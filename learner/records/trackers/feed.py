"""Sends a run's directory to one tracker, from where the last sending stopped.

`logs/tracker_KIND.json` says how far the tracker is. Figures come from `metrics.jsonl`, grids from `samples/`, the
final table from `summary.json`. The step is the number of iterations that were finished by then, of both stages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, TextIO

from common.config.run import Config
from common.config.trackers import TrackerKind
from common.errors import ConfigError
from common.types import Position, Stage
from common.whole_files import write_whole
from learner.records.trackers.protocol import ExperimentTracker, TrackedRun, open_tracker

LINES_AT_ONCE = 500
"""So many lines are sent before that is recorded."""


@dataclass(frozen=True)
class Sent:
    """Progress of sending a run to a tracker.

    Attributes:
        id: the run's id in the tracker.
        step, evaluated: the last line that was sent: its step, and whether it was an evaluation.
        table: the hash of the summary whose table was sent.
    """

    id: str
    step: int = 0
    evaluated: bool = True
    table: str = ""

    @classmethod
    def read(cls, path: Path) -> Self:
        """That of the file; a new one where there is none, or a damaged one."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        return cls(secrets.token_hex(8))

    def precedes(self, line: Line) -> bool:
        return (self.step, self.evaluated) < (line.step, line.evaluated)


@dataclass(frozen=True)
class Line:
    """A line of `metrics.jsonl`. `values` have names of the form group/name."""

    step: int
    evaluated: bool
    values: Mapping[str, float]
    position: Position

    @classmethod
    def read(cls, text: bytes, cold_start_iterations: int) -> Self | None:
        """None for a damaged line, and for one of another kind."""
        try:
            record = json.loads(text)
            evaluated = {"train": False, "evaluation": True}[record["kind"]]
            position = Position(Stage(record["stage"]), record["iteration"] + (0 if evaluated else 1))
            values = {_grouped(name, evaluated): float(value) for name, value in record["metrics"].items()}
            values |= {f"seconds/{part}": float(value) for part, value in record["seconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        before = cold_start_iterations if position.stage is Stage.ALIGNMENT else 0
        return cls(before + position.iteration, evaluated, values, position)


class Feed:
    """Sends what a run has written. Used by one thread at a time."""

    def __init__(self, run_dir: Path, config: Config, kind: TrackerKind) -> None:
        self.kind = kind
        self.run_dir = run_dir
        self._config = config
        self._file = run_dir / "logs" / f"tracker_{kind}.json"
        self._lock: TextIO | None = None
        self._tracker: ExperimentTracker | None = None
        self._offset = 0

    def send(self) -> int:
        """Send what is new; return the number of lines. After an error, the next call begins where the last one ended.

        Raises:
            ConfigError: another process sends this run to this tracker.
            Exception: whatever the tracker's package raises.
        """
        self._require_alone()
        try:
            return self._send()
        except BaseException:
            self._offset = 0
            with suppress(Exception):  # the error that led here is the one to report
                self.close()
            raise

    def close(self) -> None:
        """Close the run in the tracker. It may be opened again."""
        tracker, self._tracker = self._tracker, None
        try:
            if tracker is not None:
                tracker.close()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _require_alone(self) -> None:
        """Hold a lock, which ends with the process."""
        if self._lock is not None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lock = self._file.with_suffix(".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ConfigError(f"{self.run_dir}: another process sends this run to {self.kind}: let it end") from error
        except OSError:
            pass  # a file system without locks
        self._lock = lock

    def _send(self) -> int:
        sent = Sent.read(self._file)
        if self._tracker is None:
            run = TrackedRun(self.run_dir, self._config.run.name, self._config.trackers.project, sent.id)
            self._tracker = open_tracker(self.kind, run)
            self._tracker.configuration(_options(self._config))
            self._save(sent)
        count = 0
        for line in self._lines():
            if sent.precedes(line):
                self._send_line(self._tracker, line)
                sent, count = replace(sent, step=line.step, evaluated=line.evaluated), count + 1
                if count % LINES_AT_ONCE == 0:
                    self._save(sent)
        sent = self._send_table(self._tracker, sent)
        self._save(sent)
        return count

    def _save(self, sent: Sent) -> None:
        assert self._tracker is not None
        self._tracker.flush()
        write_whole(self._file, json.dumps(asdict(sent)).encode())

    def _lines(self) -> Iterator[Line]:
        """The complete lines after those of the last call."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return  # it is being written
                self._offset += len(text)
                line = Line.read(text, self._config.cold_start.iterations)
                if line is not None:
                    yield line

    def _send_line(self, tracker: ExperimentTracker, line: Line) -> None:
        tracker.scalars(line.step, line.values)
        grid = self.run_dir / "samples" / f"{line.position.directory}.png"
        if line.evaluated and grid.is_file():
            tracker.picture(line.step, "samples", grid)

    def _send_table(self, tracker: ExperimentTracker, sent: Sent) -> Sent:
        """Send the final table, if there is one that the tracker does not have."""
        path = self.run_dir / "summary.json"
        if not path.is_file():
            return sent
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest == sent.table:
            return sent
        policies: dict[str, dict[str, Any]] = json.loads(content)["policies"]
        metrics = list(dict.fromkeys(name for values in policies.values() for name in values))
        rows = [[policy, *(values.get(name) for name in metrics)] for policy, values in policies.items()]
        tracker.table(sent.step, "policies", ("policy", *metrics), rows)
        return replace(sent, table=digest)


def _options(config: Config) -> dict[str, str]:
    """Every option of the run by its key, with its value as JSON."""
    sections: dict[str, Any] = config.model_dump(mode="json")
    sections |= {f"rewards.{reward['name']}": reward for reward in sections.pop("rewards")}
    return {f"{name}.{key}": json.dumps(value) for name, options in sections.items() for key, value in options.items()}


def _grouped(name: str, evaluated: bool) -> str:
    """As on the console: a bare name is a loss or a norm; those of evaluations are a group of their own."""
    if evaluated:
        return f"evaluation/{name}"
    return name if "/" in name else f"loss/{name}"
