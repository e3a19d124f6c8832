"""The directory of a run as a tracker's feed reads it, and a tracker that keeps what it gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from common.config.run import Config
from learner.preflight.run_file import dump_config
from learner.records.trackers.protocol import Cell

COLD_START_ITERATIONS = 2
POLICIES = {"teacher_28": {"gold": 0.75, "diversity": 0.5}, "rtdmd": {"gold": 0.875}}


def tracked_config(**trackers: str | list[str]) -> Config:
    return Config.model_validate_json(
        json.dumps(
            {
                "run": {"name": "tracked"},
                "backbone": {"path": "model"},
                "cold_start": {"iterations": COLD_START_ITERATIONS},
                "prompts": {"train": "a.txt", "evaluation": "b.txt"},
                "rewards": [{"name": "a", "url": "http://x", "differentiable": True}],
                "trackers": trackers,
            }
        )
    )


def metrics_line(stage: str, iteration: int, kind: str = "train", **metrics: float) -> str:
    seconds = {"step": 1.5} if kind == "train" else {"evaluation": 3.0}
    record = {"stage": stage, "iteration": iteration, "kind": kind, "metrics": metrics, "seconds": seconds}
    return json.dumps(record) + "\n"


def add_lines(run_dir: Path, *lines: str) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(lines))


def write_tracked_run(run_dir: Path) -> None:
    """Two iterations of stage 1, two of stage 2, an evaluation with its grid, and a final table."""
    (run_dir / "samples").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(tracked_config()))
    Image.new("RGB", (32, 16), "red").save(run_dir / "samples" / "alignment-000001.png")
    add_lines(
        run_dir,
        metrics_line("cold_start", 0, fake_score_loss=0.5),
        metrics_line("cold_start", 1, fake_score_loss=float("nan")),
        metrics_line("alignment", 0, **{"reward/hps": 0.25}),
        metrics_line("alignment", 1, "evaluation", gold=0.75),
        metrics_line("alignment", 1, **{"reward/hps": 0.5}),
    )
    (run_dir / "summary.json").write_text(json.dumps({"policies": POLICIES}))


class KeepingTracker:
    """Keeps what it gets. `broken` is raised by every method while it is set."""

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self.got: list[tuple[int, str]] = []
        self.values: dict[tuple[int, str], float] = {}
        self.rows: list[list[Cell]] = []
        self.options: dict[str, str] = {}
        self.closed = 0

    def configuration(self, values: Mapping[str, str]) -> None:
        self.options = dict(values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._break()
        self.got.append((step, next(iter(values))))
        self.values |= {(step, name): value for name, value in values.items()}

    def picture(self, step: int, name: str, png: Path) -> None:
        self._break()
        self.got.append((step, f"{name}: {png.name}"))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self.got.append((step, name))
        self.rows = [list(columns), *map(list, rows)]

    def flush(self) -> None:
        self._break()

    def close(self) -> None:
        self.closed += 1

    def _break(self) -> None:
        if self.broken is not None:
            raise self.broken
