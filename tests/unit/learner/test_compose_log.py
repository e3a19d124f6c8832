"""The log of a run ends with the line that the console shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from common.errors import ModelError, RtdmdError
from common.types import PromptSets
from learner.compose import started_service
from learner.driver.run_directory import Start
from learner.preflight.command_line import Invocation
from learner.records.metrics_log import BEGINNING
from tests.helpers.trained_run import tiny_config


def raised_by_an_actor(cause: Exception) -> Exception:
    error: Exception = RayTaskError("call", f"\x1b[36mTraceback\x1b[39m\nremote line\n{cause!r}", cause, "x", 1, "ip")
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (raised_by_an_actor(ModelError("the base is damaged")), "the base is damaged"),
        (raised_by_an_actor(ValueError("odd\nshape")), "ValueError: odd shape; see {0}/logs/error.log"),
        (
            ValueError("odd\nshape"),
            "unexpected ValueError: odd shape; see {0}/logs/error.log: report it with that file, and go on with "
            "--resume",
        ),
        (
            OSError(28, "No space left on device", "/w/x"),
            "/w/x: No space left on device; free space there, or write elsewhere; see {0}/logs/error.log",
        ),
    ],
)
def test_the_reason_is_in_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    """Ray's error is a traceback in colour, whose beginning alone would fit into the line."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("learner.compose.with_known_threads", fail)
    invocation = Invocation(tiny_config(tmp_path, tmp_path / "a.txt"), tmp_path, dry_run=False, resume=False)
    with (
        pytest.raises(RtdmdError) as caught,
        started_service(invocation, tmp_path, Start(BEGINNING), PromptSets([], [], []), None),
    ):
        pytest.fail("entered")
    assert str(caught.value) == line.format(tmp_path)
    last = (tmp_path / "logs" / "run.log").read_text().splitlines()[-1]
    assert last.endswith(f" rtdmd WARNING the run ends: {caught.value}")
