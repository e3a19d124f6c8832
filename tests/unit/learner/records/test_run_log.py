"""Our lines go to run.log and, by their level, to the console; Ray's to ray.log."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from common.errors import RunStopped
from learner.records.run_log import LogLevel, announce, run_log


def test_ray_has_a_log_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chatter = logging.StreamHandler()
    ray = logging.getLogger("ray")
    before = ray.handlers
    ray.handlers = [chatter]
    try:
        for number in range(2):
            with run_log(tmp_path / "logs"):
                ray.info("Started a local Ray instance %d.", number)
                logging.getLogger("ray._private").warning("a warning")
            assert ray.handlers == [chatter]
    finally:
        ray.handlers = before
    text = (tmp_path / "logs" / "ray.log").read_text()
    assert [text.count(part) for part in ("instance 0.", "instance 1.", "a warning")] == [1, 1, 2]
    assert (tmp_path / "logs" / "run.log").read_text() == ""
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (LogLevel.DEBUG, ["a detail", "going on", "warning: worker 1 is gone", "error: cannot look", "of Ray"]),
        (LogLevel.INFO, ["going on", "warning: worker 1 is gone", "error: cannot look"]),
        (LogLevel.WARNING, ["warning: worker 1 is gone", "error: cannot look"]),
        (LogLevel.ERROR, ["error: cannot look"]),
    ],
)
def test_the_console_shows_lines_of_its_level(
    tmp_path: Path, level: LogLevel, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with run_log(tmp_path, level):
        logging.getLogger("rtdmd").debug("a detail")
        logging.getLogger("rtdmd").info("going\non")
        announce("worker 1 is gone")
        try:
            raise ValueError("odd")
        except ValueError:
            logging.getLogger("common.rewards.discovery").exception("cannot look")
        logging.getLogger("ray").info("of Ray")
    assert capsys.readouterr().err.splitlines() == shown
    written = (tmp_path / "run.log").read_text()
    for part in ("worker 1 is gone", "going\non", "cannot look", "ValueError: odd"):
        assert part in written


def test_warnings_of_python_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # once more: pytest has its own function in place
        warnings.warn("an old way", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: an old way" in (tmp_path / "run.log").read_text()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"), [(RunStopped("interrupted"), "interrupted"), (KeyboardInterrupt(), "Keybo")]
)
def test_the_last_line_says_why_a_run_ended(
    tmp_path: Path, error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal that would show it may have been closed. The command itself shows it."""
    with pytest.raises(type(error)), run_log(tmp_path):
        raise error
    assert f"WARNING the run ends: {line}" in (tmp_path / "run.log").read_text().splitlines()[-1]
    assert capsys.readouterr().err == ""
