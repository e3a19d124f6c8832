"""The methods of every experiment tracker, and how one is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from common.config.trackers import TrackerKind
from common.errors import ConfigError

Cell = str | float | None


class TrackerError(Exception):
    """A tracker cannot be used. The message names the remedy."""


@dataclass(frozen=True)
class TrackedRun:
    """The run as a tracker names it.

    Attributes:
        id: 16 characters. A run that is resumed has the same one, and goes on where it was.
    """

    directory: Path
    name: str
    project: str
    id: str


class ExperimentTracker(Protocol):
    """A run that is open in a tracker. Every method may raise errors of the tracker's package."""

    def configuration(self, values: Mapping[str, str]) -> None:
        """Record the options of the run: dotted key -> value as text."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures; steps never decrease."""

    def picture(self, step: int, name: str, png: Path) -> None: ...

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None: ...

    def flush(self) -> None:
        """Return when what was recorded is kept by the tracker, or in its own files."""

    def close(self) -> None: ...


CLASSES = {
    TrackerKind.TENSORBOARD: "learner.records.trackers.tensorboard_files:TensorBoardFiles",
    TrackerKind.WANDB: "learner.records.trackers.weights_and_biases:WeightsAndBiases",
    TrackerKind.TRACKIO: "learner.records.trackers.trackio_project:TrackioProject",
    TrackerKind.MLFLOW: "learner.records.trackers.mlflow_experiment:MlflowExperiment",
}


def open_tracker(kind: TrackerKind, run: TrackedRun) -> ExperimentTracker:
    """Open the run in a tracker. It may raise any error of the tracker's package."""
    module, _, name = CLASSES[kind].partition(":")
    opened: Callable[[TrackedRun], ExperimentTracker] = vars(import_module(module))[name]
    return opened(run)


def require_installed(kinds: Iterable[TrackerKind]) -> None:
    """ConfigError if the package of a tracker is missing."""
    for kind in kinds:
        spec = find_spec(kind.value)
        if spec is None or spec.origin is None:  # without origin it is a folder of that name, such as wandb's own
            raise ConfigError(
                f"trackers.kinds: {kind}: the package {kind} is not installed: pip install {kind}, or leave it out"
            )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The table as Markdown, for trackers whose texts may be that."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"
