"""Lines of Ray's processes: all are logged, our warnings reach the console once."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from learner.records.run_log import run_log

process_output = pytest.importorskip("learner.driver.process_output", reason="needs ray")


def lines(pid: int | str, *text: str, actor: str | None = "RolloutWorker") -> object:
    return {"ip": "10.0.0.1", "pid": pid, "lines": list(text), "actor_name": actor, "is_err": True}


def test_our_warnings_are_shown_and_everything_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = process_output.ProcessOutput()
    out = "rtdmd WARNING: reward hps is out (timeout): holding for up to 600 s"
    with run_log(tmp_path):
        for pid in (7, 8):
            output.take(lines(pid, "chatter of a library", out))
        output.take(lines(9, "rtdmd ERROR: cannot look", "Traceback (most recent call last):", actor="Learner"))
        output.take(lines(10, "a crash of the raylet", actor=None))
    assert capsys.readouterr().err.splitlines() == [
        "warning: worker (10.0.0.1:7): reward hps is out (timeout): holding for up to 600 s",
        "error: learner (10.0.0.1:9): cannot look",
    ]
    logged = (tmp_path / "ray.log").read_text()
    for part in (":7): chatter", ":8): rtdmd WARNING: reward", "Traceback", "process (10.0.0.1:10): a crash"):
        assert part in logged
    assert (tmp_path / "run.log").read_text().count("reward hps is out") == 1


def test_ray_prints_nothing_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray's threads look the function up where it is replaced, as its own code shows."""
    from ray._private import worker

    before = worker.print_to_stdstream
    for function in (worker.connect, worker.listen_error_messages):
        assert "print_to_stdstream" in inspect.unwrap(function).__code__.co_names
    with run_log(tmp_path), process_output.logged_processes():
        worker.print_to_stdstream({"lines": ["A worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        worker.print_to_stdstream(lines("autoscaler", "=== status ==="), ignore_prefix=True)
    assert worker.print_to_stdstream is before
    assert "process (this machine:raylet): A worker died" in (tmp_path / "ray.log").read_text()
    assert "status" not in (tmp_path / "ray.log").read_text()
    assert capsys.readouterr() == ("", "")
