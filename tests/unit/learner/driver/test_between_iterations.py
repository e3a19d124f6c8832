"""Requests to pause, stop or scale a run, and the watchdog's alarms; nothing here needs a learner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config.run import Config
from common.errors import RunStopped, StoreError
from common.run_control import RunControl, RunRequest
from common.types import Position, Stage
from learner.driver import between_iterations as milestones
from learner.driver.between_iterations import RunMilestones
from learner.driver.checkpoint_writer import CheckpointWriter
from learner.driver.watchdog import Watchdog, Watched
from learner.records.line_file import LineFile

POSITION = Position(Stage.ALIGNMENT, 7)


class Control(RunControl):
    """Asks for `requests`, in turn; an error is raised."""

    def __init__(self, *requests: RunRequest | StoreError | None) -> None:
        self.requests = list(requests)
        self.taken_back = False
        self.made: list[RunRequest | None] = []
        self.workers: list[int | StoreError | None] = []

    def asked(self) -> RunRequest | None:
        request = self.requests.pop(0)
        if isinstance(request, StoreError):
            raise request
        return request

    def workers_asked(self) -> int | None:
        request = self.workers.pop(0) if self.workers else None
        if isinstance(request, StoreError):
            raise request
        return request

    def ask(self, request: RunRequest | None) -> None:
        self.taken_back = request is None
        self.made.append(request)


class Pool:
    """The numbers of workers that were asked of it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def resize(self, workers: int) -> None:
        self.sizes.append(workers)


class Messages:
    """The tracker's messages, and the detectors whose alarms it counted."""

    def __init__(self, run_dir: Path) -> None:
        self.lines = LineFile(run_dir / "metrics.jsonl")
        self.messages: list[str] = []
        self.alarms: list[str] = []

    def alarm(self, detector: str) -> None:
        self.alarms.append(detector)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def paused(self, paused: bool) -> None:
        self.messages.append("paused" if paused else "not paused")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(milestones.time, "sleep", slept.append)
    return slept


def milestones_of(run_dir: Path, control: Control | None, on_alarm: str = "warn") -> tuple[RunMilestones, Messages]:
    """The periodic work of a run after whose present iteration no evaluation is due."""
    sections: dict[str, Any] = {
        "run": {"name": "test"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "rewards": [
            {"name": "a", "url": "http://x", "differentiable": True},
            {"name": "gold", "url": "http://y", "weight": 0, "evaluation_only": True},
        ],
        "watchdog": {"on_alarm": on_alarm},
    }
    tracker: Any = Messages(run_dir)
    unused: Any = None
    pool: Any = Pool()
    config = Config.model_validate(sections)
    watchdog = Watchdog(Watched.of(config), run_dir)
    checkpoints = CheckpointWriter(config.checkpoint, run_dir, unused, tracker, {}, [], lambda: None)
    made = RunMilestones(config, run_dir, unused, pool, tracker, checkpoints, watchdog, [], unused, control)
    (run_dir / "metrics.jsonl").touch()
    return made, tracker


def asked(control: Control | None, run_dir: Path) -> list[str]:
    """Messages of the run after an iteration that has its checkpoint already and on which nothing else is due."""
    (run_dir / "checkpoints" / POSITION.directory).mkdir(parents=True)
    made, tracker = milestones_of(run_dir, control)
    made.after(POSITION)
    return tracker.messages


@pytest.mark.parametrize("control", [None, Control(None), Control(StoreError("away"))])
def test_a_run_nobody_asks_anything_of_goes_on(control: Control | None, tmp_path: Path, pauses: list[float]) -> None:
    assert asked(control, tmp_path) == []
    assert pauses == []


@pytest.mark.parametrize("end", [None, StoreError("away")])
def test_a_pause_lasts_until_it_is_taken_back_or_redis_is_lost(
    end: StoreError | None, tmp_path: Path, pauses: list[float]
) -> None:
    messages = asked(Control("pause", "pause", "pause", end), tmp_path)
    told = "paused on request; delete rtdmd:run:test in Redis to continue"
    assert messages == [told, "paused", "not paused", "continuing"]
    assert len(pauses) == 3


@pytest.mark.parametrize("requests", [["stop"], ["pause", "stop"]])
def test_a_stop_is_obeyed_once(requests: list[RunRequest], tmp_path: Path, pauses: list[float]) -> None:
    control = Control(*requests)
    with pytest.raises(RunStopped, match="stopped on request after 7 iterations of alignment"):
        asked(control, tmp_path)
    assert control.taken_back


def test_another_number_of_workers_is_used_once_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / POSITION.directory).mkdir(parents=True)
    control, pool = Control(*[None] * 5), Pool()
    control.workers = [None, 8, StoreError("away"), 8, 2]
    made, tracker = milestones_of(tmp_path, control)
    made._pool = pool  # type: ignore[assignment]
    for _ in range(5):
        made.after(POSITION)
    assert pool.sizes == [8, 2]
    assert tracker.messages == [
        f"uses {count} rollout workers on request, or as many as can be placed" for count in (8, 2)
    ]


def write_drift(run_dir: Path) -> None:
    """A grid appears in the images of the newest two of seven iterations."""
    lines = []
    for iteration in range(POSITION.iteration):
        grid = {"groups": 8.0, "group_mean/grid": 0.5 + 2 * (iteration >= 5), "group_error/grid": 0.05}
        lines.append(json.dumps({"stage": "alignment", "iteration": iteration, "kind": "train", "metrics": grid}))
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_evaluations(run_dir: Path, **gold: float) -> None:
    """Evaluations after these iterations (`after_2=0.5`), each with a checkpoint."""
    lines = []
    for name, value in gold.items():
        iteration = int(name.removeprefix("after_"))
        line = {"stage": "alignment", "iteration": iteration, "kind": "evaluation", "basis": "x"}
        lines.append(json.dumps(line | {"values": {"gold": [value]}}))
        (run_dir / "checkpoints" / Position(Stage.ALIGNMENT, iteration).directory).mkdir(parents=True)
    (run_dir / "watchdog.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("on_alarm", "told"), [("mark", 0), ("warn", 1)])
def test_an_alarm_is_counted_once_and_printed_on_demand(on_alarm: str, told: int, tmp_path: Path) -> None:
    made, tracker = milestones_of(tmp_path, None, on_alarm)
    write_drift(tmp_path)
    made.after(POSITION)
    made.after(POSITION)
    assert tracker.alarms == ["grid"]
    assert len(tracker.messages) == told
    assert all(text.startswith("watchdog, after 7 iterations: a periodic pattern") for text in tracker.messages)
    (line,) = (tmp_path / "watchdog.jsonl").read_text().splitlines()
    assert json.loads(line)["detector"] == "grid"


def test_an_alarm_pauses_the_run_through_redis(tmp_path: Path, pauses: list[float]) -> None:
    control = Control("pause", "pause", None)
    made, tracker = milestones_of(tmp_path, control, "pause")
    write_drift(tmp_path)
    (tmp_path / "checkpoints" / POSITION.directory).mkdir(parents=True)
    made.after(POSITION)
    assert control.made == ["pause"]
    assert len(pauses) == 2
    assert tracker.messages[-1] == "continuing"


class LostControl(Control):
    def ask(self, request: RunRequest | None) -> None:
        raise StoreError("away")


@pytest.mark.parametrize("control", [None, LostControl()])
def test_without_redis_an_alarm_stops_the_run_instead(control: Control | None, tmp_path: Path) -> None:
    made, _ = milestones_of(tmp_path, control, "pause")
    write_drift(tmp_path)
    (tmp_path / "checkpoints" / POSITION.directory).mkdir(parents=True)
    with pytest.raises(RunStopped, match="stopped by the watchdog, because there is no Redis to pause in"):
        made.after(POSITION)


def test_an_alarm_rolls_back_to_the_best_checkpoint(tmp_path: Path) -> None:
    write_evaluations(tmp_path, after_0=0.5, after_2=0.875, after_4=0.75, after_6=0.25)
    made, tracker = milestones_of(tmp_path, None, "roll_back")
    write_drift(tmp_path)
    with pytest.raises(RunStopped, match=r"back by the watchdog to alignment-000002.*\(0\.875\); 2 later ones"):
        made.after(POSITION)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    later = ["alignment-000004.rolled_back", "alignment-000006.rolled_back"]
    assert kept == ["alignment-000000", "alignment-000002", *later]
    assert tracker.alarms == ["grid"]


def test_without_an_evaluated_checkpoint_nothing_is_rolled_back(tmp_path: Path) -> None:
    made, _ = milestones_of(tmp_path, None, "roll_back")
    write_drift(tmp_path)
    (tmp_path / "checkpoints" / POSITION.directory).mkdir(parents=True)
    with pytest.raises(RunStopped, match="without a roll-back: no checkpoint of this stage was evaluated"):
        made.after(POSITION)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [POSITION.directory]
