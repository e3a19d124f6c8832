"""Lines of Ray's processes: all are logged, our warnings reach the console once."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.records.run_log import run_log

process_output = pytest.importorskip("learner.driver.process_output", reason="needs ray")


def lines(pid: int, *text: str, actor: str | None = "RolloutWorker") -> object:
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


def test_the_function_of_ray_that_prints_is_replaced_until_the_end() -> None:
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    before = list(dispatcher.handlers)
    dispatcher.add_handler("ray_print_logs", pytest.fail)
    try:
        with process_output.logged_processes():
            dispatcher.emit(lines(7, "chatter"))
        assert dispatcher.handlers == before
    finally:
        dispatcher.handlers = before
