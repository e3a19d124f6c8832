"""A folder for sockets is short enough, whatever TMPDIR is."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from common import short_folder as module
from common.errors import ConfigError
from common.short_folder import short_folder


def test_the_usual_folder_is_taken_if_a_name_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: 107 are allowed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = 107 - len(str(tmp_path))
    assert short_folder(room, "VARIABLE", {}) == tmp_path
    assert short_folder(room + 1, "VARIABLE", {}) != tmp_path


def test_bytes_are_counted_and_not_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ü"
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    room = 107 - len(str(folder))
    assert short_folder(room, "VARIABLE", {}) != folder
    assert short_folder(room - 1, "VARIABLE", {}) == folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_folder_on_a_full_disk_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a file can be made, but nothing can be written into it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(ConfigError, match="set VARIABLE to a folder that can be written"):
            short_folder(10, "VARIABLE", {"VARIABLE": str(tmp_path)})


def test_without_any_folder_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setattr(module, "SHORT_FOLDERS", (Path("/proc/elsewhere"),))
    expected = "set VARIABLE to a folder that can be written .* 57 bytes, .* tried /proc/nowhere, /proc/elsewhere"
    with pytest.raises(ConfigError, match=expected):
        short_folder(50, "VARIABLE", {})
