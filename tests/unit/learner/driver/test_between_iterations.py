"""Requests to pause or to stop a run; nothing here needs a learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config.run import Config
from common.errors import RunStopped, StoreError
from common.run_control import RunControl, RunRequest
from common.types import Position, Stage
from learner.driver import between_iterations as milestones
from learner.driver.between_iterations import RunMilestones

POSITION = Position(Stage.ALIGNMENT, 7)


class Control(RunControl):
    """Asks for `requests`, in turn; an error is raised."""

    def __init__(self, *requests: RunRequest | StoreError | None) -> None:
        self.requests = list(requests)
        self.taken_back = False

    def asked(self) -> RunRequest | None:
        request = self.requests.pop(0)
        if isinstance(request, StoreError):
            raise request
        return request

    def ask(self, request: RunRequest | None) -> None:
        self.taken_back = request is None


class Messages:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def paused(self, paused: bool) -> None:
        self.messages.append("paused" if paused else "not paused")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(milestones.time, "sleep", slept.append)
    return slept


def asked(control: Control | None, run_dir: Path) -> list[str]:
    """Messages of the run after an iteration that has its checkpoint already and on which nothing else is due."""
    (run_dir / "checkpoints" / POSITION.directory).mkdir(parents=True)
    sections: dict[str, Any] = {
        "run": {"name": "test"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "rewards": [{"name": "a", "url": "http://x", "differentiable": True}],
    }
    tracker: Any = Messages()
    unused: Any = None
    config = Config.model_validate(sections)
    RunMilestones(config, run_dir, unused, unused, unused, tracker, [], unused, {}, control).after(POSITION)
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
