"""Files are written whole, with the permissions of the umask, and errors name them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.whole_files import whole_files, write_whole


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    with whole_files(tmp_path / "new") as folder:
        save_file({"a": torch.ones(2)}, folder / "a.safetensors")
    write_whole(tmp_path / "new" / "b", b"bytes")
    assert load_file(tmp_path / "new" / "a.safetensors")["a"].tolist() == [1.0, 1.0]
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert found == {"a.safetensors": 0o666 & ~umask, "b": 0o666 & ~umask}


def test_a_file_system_that_refuses_chmod_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS, Azure Files and vfat, mounted for another user: files can be written, their modes cannot be changed."""
    refused = []

    def chmod(path: Path, mode: int) -> None:
        refused.append(path.name)
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", chmod)
    with whole_files(tmp_path) as folder:
        (folder / "right").write_bytes(b"1")
        (folder / "other").touch(0o600)
    assert refused == ["other"]  # where the mode is right, nothing is asked
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"right": b"1", "other": b""}


def test_after_a_failure_the_file_before_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"before")

    def interrupted() -> None:
        with whole_files(tmp_path) as folder:
            (folder / "a").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"before"}


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (SafetensorError(FULL), "."),
        (OSError(errno.ENOSPC, "No space left on device"), "."),
        (OSError(errno.ENOSPC, "No space left on device", "{folder}/a"), "a"),
        (OSError(errno.ENOSPC, "No space left on device", "/elsewhere/a"), "/elsewhere/a"),
    ],
)
def test_a_full_disk_is_an_error_of_the_system_with_its_path(tmp_path: Path, error: Exception, named: str) -> None:
    def fail() -> None:
        with whole_files(tmp_path) as folder:
            if isinstance(error, OSError) and error.filename:
                error.filename = error.filename.format(folder=folder)
            raise error

    with pytest.raises(OSError, match="No space left on device") as caught:
        fail()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / named))
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_safetensors_stays(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="duplicate"), whole_files(tmp_path):
        raise SafetensorError("duplicate names")


def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="taken") as caught:
        write_whole(tmp_path / "taken" / "a.png", b"")
    assert caught.value.filename == str(tmp_path / "taken" / "a.png")
