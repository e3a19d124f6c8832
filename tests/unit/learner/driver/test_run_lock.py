"""One process uses a run directory, also where the file system has no flock, or has it on one machine only."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from learner.driver import run_lease
from learner.driver.run_lease import OWNER, Owner
from learner.driver.run_lock import locked
from tests.helpers.waiting import wait_until


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre mounted without `-o flock`."""

    def flock(file: Any, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"RENEW_S": 0.05, "LEASE_S": 0.5, "LOOK_S": 0.05}.items():
        monkeypatch.setattr(run_lease, name, seconds)


def written(path: Path) -> Owner:
    fields = json.loads(path.read_text())
    del fields["renewed"]
    return Owner(**fields)


def text_of(owner: Owner, renewed: int = 1) -> str:
    return json.dumps({**asdict(owner), "renewed": f"{renewed:012d}"})


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_file_names_the_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = tmp_path / OWNER
    with locked(tmp_path):
        assert written(owner) == Owner.this_process()
        expected = f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}: .*remove {owner}"
        with pytest.raises(ConfigError, match=expected), locked(tmp_path):
            pytest.fail("entered")
    assert not owner.exists()
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path}: its file system has no locks (")
    assert told.count("\n") == 1
    with locked(tmp_path):
        assert owner.exists()


def elsewhere() -> list[Owner]:
    """On another machine; and in another container, although its host has our name."""
    this = Owner.this_process()
    return [replace(this, host="elsewhere"), replace(this, namespace="pid:[1]", started="1")]


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("owner", elsewhere(), ids=["machine", "container"])
def test_a_process_elsewhere_that_renews_its_lease_keeps_the_directory(owner: Owner, tmp_path: Path) -> None:
    """Also where flock holds on one machine only."""
    file, stop = tmp_path / OWNER, threading.Event()
    file.write_text(text_of(owner))

    def renew() -> None:
        for count in itertools.count(2):
            with file.open("r+") as opened:
                opened.write(text_of(owner, count))
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=f"is in use by process {owner.pid} on {owner.host}"), locked(tmp_path):
            pytest.fail("entered")
    finally:
        stop.set()
        thread.join()
    assert written(file) == owner


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("owner", elsewhere(), ids=["machine", "container"])
def test_a_lease_that_is_not_renewed_is_taken_over(
    owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / OWNER).write_text(text_of(owner))
    with locked(tmp_path):
        assert written(tmp_path / OWNER) == Owner.this_process()
    told = f"{tmp_path} was used by process {owner.pid} on {owner.host}: waiting 0.5 s to see whether it still is\n"
    assert capsys.readouterr().err == told
    assert list(tmp_path.glob(f"{OWNER}*")) == []


@pytest.mark.usefixtures("short_lease")
def test_a_lease_changes_and_comes_back_when_it_is_removed(tmp_path: Path) -> None:
    file = tmp_path / OWNER
    with locked(tmp_path):
        before = file.read_text()
        wait_until(lambda: file.read_text() not in ("", before), "the lease to be renewed")
        assert len(file.read_text()) == len(before)
        file.unlink()
        wait_until(file.exists, "the lease to come back")
        assert written(file) == Owner.this_process()


@pytest.mark.usefixtures("short_lease")
def test_a_process_that_has_lost_its_lease_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was frozen for longer than the lease."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    other = text_of(elsewhere()[0])
    with locked(tmp_path):
        (tmp_path / OWNER).write_text(other)
        wait_until(lambda: bool(sent), "the process to be ended")
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert (tmp_path / OWNER).read_text() == other


@pytest.mark.usefixtures("no_flock")
def test_the_file_of_a_dead_process_on_this_host_is_taken_over(tmp_path: Path) -> None:
    code = "import sys; from learner.driver.run_lease import Owner; print(repr(Owner.this_process()))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[4])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    dead = eval(done.stdout, {"Owner": Owner})
    this = Owner.this_process()
    for gone in (dead, replace(this, started="1")):  # the second: another process has the id now
        (tmp_path / OWNER).write_text(json.dumps(asdict(gone)))
        with locked(tmp_path):
            assert written(tmp_path / OWNER) == this
        assert list(tmp_path.glob(f"{OWNER}*")) == []


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    "text",
    ["", "{}", json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}), json.dumps(asdict(elsewhere()[0]))],
    ids=["empty", "nothing", "no namespace", "an earlier version's"],
)
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


def test_with_flock_a_second_process_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="is in use by another process"), locked(tmp_path):
        pytest.fail("entered")
    assert capsys.readouterr().err == ""
    assert not (tmp_path / OWNER).exists()


def test_another_error_of_the_lock_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pytest.fail("entered")
