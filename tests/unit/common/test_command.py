"""Every command ends in the same way: a status, and at most one line."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.command import duration, exit_status, some_time, system_error, user_path
from common.errors import ConfigError, LearnerError, RunStopped
from common.project_files import PROJECT_ROOT


def test_a_path_of_a_command_line_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert user_path("~/x") == Path("/home/ada/x")
    assert user_path("a/~") == Path("a/~")
    assert user_path("~nobody-here/x") == Path("~nobody-here/x")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it is empty: name a path"):
        user_path("")


NAMED = OSError(errno.ENOSPC, "No space left on device", "/data/x")
NAMELESS = OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize(
    ("error", "place", "expected"),
    [
        (NAMED, Path("/runs"), "/data/x: No space left on device; free space there, or write elsewhere"),
        (OSError(errno.ENOSPC, "No space", "/from", None, "/to"), None, "/to: No space; free space"),
        (OSError(errno.EACCES, "Denied", "/from", None, "/to"), None, "/from: Denied; give this user"),
        (NAMELESS, Path("/runs"), "/runs: Operation not supported; its file system cannot do this: name a path on an"),
        (NAMELESS, None, "Operation not supported; its file system"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a\xff"), None, "/a\udcff: Permission denied; give this"),
        (OSError("two\nlines"), None, "two lines"),
        (OSError(), None, "OSError"),
    ],
)
def test_an_error_of_the_system_names_the_path_and_a_remedy(error: OSError, place: Path | None, expected: str) -> None:
    assert system_error(error, place).startswith(expected)


def test_an_error_of_the_system_is_one_line_and_its_traceback_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail() -> None:
        (tmp_path / "absent" / "file").write_text("x")

    assert exit_status(fail) == 1
    (log,) = tmp_path.glob("rtdmd-error-*.log")
    expected = f"error: {tmp_path}/absent/file: No such file or directory; name another path; see {log}\n"
    assert capsys.readouterr().err == expected
    assert "in fail" in log.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert exit_status(fail, prefix="convert", failed=2) == 2
    assert capsys.readouterr().err == expected.partition("; see")[0].replace("error:", "convert:", 1) + "\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("odd"), 2, "error: odd"),
        (LearnerError("gone"), 1, "error: gone"),
        (RunStopped("stopped"), 130, "stopped; continue with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_end_has_its_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def end() -> None:
        raise error

    assert exit_status(end) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_current_directory_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_status(lambda: pytest.fail("entered")) == 2
    assert capsys.readouterr().err.startswith("error: the current directory does not exist any more: change to another")


def test_python_without_docstrings_is_refused() -> None:
    """Libraries would end it with a line about one of their classes."""
    program = "from common.command import exit_status; raise SystemExit(exit_status(lambda: print('entered')))"
    command = [sys.executable, "-c", program]
    for level, status, out in (("1", 0, "entered\n"), ("2", 2, "")):
        environment = os.environ | {"PYTHONOPTIMIZE": level, "PYTHONPATH": str(PROJECT_ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr == (
        "error: Python runs without docstrings, which transformers needs: unset PYTHONOPTIMIZE, or set it to 1\n"
    )


def test_a_time_is_finite_and_above_0() -> None:
    assert (duration("0"), some_time("0.5")) == (0.0, 0.5)
    for text in ("-1", "nan", "inf", "1e999", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a finite number of at least 0"):
            some_time(text)
    with pytest.raises(argparse.ArgumentTypeError, match="not more than 0 seconds"):
        some_time("0")
