"""Ray's messages and a lost output go into the run's log, not onto the console."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from common.errors import RunStopped
from learner.records.run_log import run_log


def test_the_log_gets_what_the_console_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "logs" / "run.log"
    chatter = logging.StreamHandler()
    ray, ours = logging.getLogger("ray"), logging.getLogger("rtdmd")
    before = ray.handlers
    ray.handlers = [chatter]
    try:
        for number in range(2):
            with run_log(path):
                ray.info("Started a local Ray instance %d.", number)
                logging.getLogger("ray._private").warning("a warning")
                ours.warning("standard output is lost")
            assert ray.handlers == [chatter]
    finally:
        ray.handlers = before
    text = path.read_text()
    assert [text.count(part) for part in ("instance 0.", "instance 1.", "a warning", "is lost")] == [1, 1, 2, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"), [(RunStopped("interrupted"), "interrupted"), (KeyboardInterrupt(), "Keybo")]
)
def test_the_last_line_says_why_a_run_ended(tmp_path: Path, error: BaseException, line: str) -> None:
    """The terminal that would show it may have been closed."""
    with pytest.raises(type(error)), run_log(tmp_path / "run.log"):
        raise error
    assert f"WARNING the run ends: {line}" in (tmp_path / "run.log").read_text().splitlines()[-1]
