"""One process uses a run directory, also where the file system has no flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from learner.driver.run_lock import OWNER, Owner, locked


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre mounted without `-o flock`."""

    def flock(file: Any, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_file_names_the_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = tmp_path / OWNER
    with locked(tmp_path):
        assert json.loads(owner.read_text()) == asdict(Owner.this_process())
        expected = f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}: .*remove {owner}"
        with pytest.raises(ConfigError, match=expected), locked(tmp_path):
            pytest.fail("entered")
    assert not owner.exists()
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path}: its file system has no locks (")
    assert told.count("\n") == 1
    with locked(tmp_path):
        assert owner.exists()


@pytest.mark.usefixtures("no_flock")
def test_a_process_of_another_container_may_be_alive(tmp_path: Path) -> None:
    """Its id means nothing here, although its host has our name."""
    elsewhere = replace(Owner.this_process(), namespace="pid:[1]", started="1")
    (tmp_path / OWNER).write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(ConfigError, match="is in use by"), locked(tmp_path):
        pytest.fail("entered")
    assert json.loads((tmp_path / OWNER).read_text()) == asdict(elsewhere)


@pytest.mark.usefixtures("no_flock")
def test_the_file_of_a_dead_process_on_this_host_is_taken_over(tmp_path: Path) -> None:
    code = "import sys; from learner.driver.run_lock import Owner; print(Owner.this_process())"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[4])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    dead = eval(done.stdout, {"Owner": Owner})
    this = Owner.this_process()
    for gone in (dead, replace(this, started="1")):  # the second: another process has the id now
        (tmp_path / OWNER).write_text(json.dumps(asdict(gone)))
        with locked(tmp_path):
            assert json.loads((tmp_path / OWNER).read_text()) == asdict(this)
        assert list(tmp_path.glob(f"{OWNER}*")) == []


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("text", ["", "{}", json.dumps({"host": "elsewhere", "pid": 1, "started": "1"})])
def test_an_owner_of_which_nothing_is_known_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / OWNER).write_text(text)
    expected = rf"in use by .*If that process has ended, remove {tmp_path / OWNER}"
    with pytest.raises(ConfigError, match=expected), locked(tmp_path):
        pytest.fail("entered")
    assert (tmp_path / OWNER).read_text() == text


@pytest.mark.usefixtures("no_flock")
def test_an_error_inside_frees_the_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert not (tmp_path / OWNER).exists()


def test_with_flock_there_is_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path):
        assert not (tmp_path / OWNER).exists()
        with pytest.raises(ConfigError, match="is in use by another process"), locked(tmp_path):
            pytest.fail("entered")
    assert capsys.readouterr().err == ""


def test_another_error_of_the_lock_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pytest.fail("entered")
