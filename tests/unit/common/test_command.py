"""Every command ends in the same way: a status, and at most one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.command import user_path


def test_a_path_of_a_command_line_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert user_path("~/x") == Path("/home/ada/x")
    assert user_path("a/~") == Path("a/~")
    assert user_path("~nobody-here/x") == Path("~nobody-here/x")
